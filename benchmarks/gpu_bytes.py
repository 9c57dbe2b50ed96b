"""Counts, on paper, what the GPU plans read and write for every shape of ResNet-50: `python benchmarks/gpu_bytes.py`; no GPU is needed.

A pass is one read or write of a tensor of x's size. The forward of `split` reads x twice and writes y; `in_registers` reads it once;
`whole` reads it twice, the second time from the L2 cache. The backward reads x and dy twice and writes dx. With a residual and ReLU the
forward also reads the residual; the backward also reads y twice and writes the gradient of the residual.
"""

from __future__ import annotations

import math

from batchnorm.bench import suite
from batchnorm.bench.case import with_batch
from batchnorm.kernels.gpu import plans
from batchnorm.kernels.gpu.plans import Shape

BATCH, BYTES = 256, 2  # bfloat16


def passes(way: str, residual: bool) -> tuple[int, int]:
    """Of memory, forward and backward; the second read of `whole` is from the cache."""
    again = way == "split"
    forward = 2 + again + residual
    tensors = 2 + residual
    backward_again = tensors if again else 0
    return forward, tensors + backward_again + 1 + residual


def main() -> None:
    print("| shape (C, H, W) | epilogue | layers | MB | layout | plan | forward, MB | backward, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for layer in with_batch(suite.load("resnet50"), BATCH).layers:
        N, C, *S = layer.shape
        positions = math.prod(S)
        megabytes = math.prod(layer.shape) * BYTES / 1e6
        epilogue = "+".join(
            ["BN", *(["add"] if layer.residual else []), *([layer.activation] if layer.activation else [])]
        )
        for layout in ("channels_last", "planar"):
            planar = layout == "planar"
            shape = Shape("bfloat16", planar, N if planar else N * positions, C, positions if planar else 1)
            cut = plans.left_to_torch(shape) or plans.cut(shape)
            what = f"| {', '.join(map(str, (C, *S)))} | {epilogue} | {layer.count} | {megabytes:.0f} | {layout} |"
            if isinstance(cut, str):
                print(f"{what} torch's operators | - | - |")
                continue
            forward, backward = (count * megabytes for count in passes(cut.plan.way, layer.residual))
            print(f"{what} {cut.plan.name} | {forward:.0f} | {backward:.0f} |")


if __name__ == "__main__":
    main()
