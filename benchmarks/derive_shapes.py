"""Derives src/batchnorm/bench/shapes/*.toml from the tables of the papers, so that no shape is invented.

    python benchmarks/derive_shapes.py    # writes the files; a test sees that they are what this script writes

Each network is walked as its paper's table lists it, and every batch norm is noted with its output shape and what follows it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

SHAPES = Path(__file__).parent.parent / "src" / "batchnorm" / "bench" / "shapes"


class Layer(NamedTuple):
    """One batch norm: what it normalizes, and what its output goes through next."""

    shape: tuple[int, ...]  # (C, *S)
    activation: str | None = "relu"
    residual: bool = False
    batch: int | None = None  # where it is not the network's


def resnet50() -> list[Layer]:
    """Table 1, 50-layer: bottlenecks 1x1, 3x3, 1x1; the stride is in the 3x3, as everybody trains it today."""
    layers, size = [Layer((64, 112, 112))], 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            layers.append(Layer((width, size, size)))
            if block == 0:
                size //= 1 if stage == 0 else 2
                layers.append(Layer((4 * width, size, size), None))  # projection of the shortcut
            layers += [Layer((width, size, size)), Layer((4 * width, size, size), residual=True)]
    return layers


def mobilenet_v3() -> list[Layer]:
    """Table 1, MobileNetV3-Large: (expansion, output, activation, stride) of each bottleneck."""
    relu, hardswish = "relu", "hardswish"
    rows = [(16, 16, relu, 1), (64, 24, relu, 2), (72, 24, relu, 1), (72, 40, relu, 2), (120, 40, relu, 1)]
    rows += [(120, 40, relu, 1), (240, 80, hardswish, 2), (200, 80, hardswish, 1), (184, 80, hardswish, 1)]
    rows += [(184, 80, hardswish, 1), (480, 112, hardswish, 1), (672, 112, hardswish, 1), (672, 160, hardswish, 2)]
    rows += [(960, 160, hardswish, 1), (960, 160, hardswish, 1)]
    layers, channels, size = [Layer((16, 112, 112), hardswish)], 16, 112
    for expansion, output, activation, stride in rows:
        layers += _inverted_bottleneck(channels, expansion, output, size, stride, activation)
        channels, size = output, size // stride
    return [*layers, Layer((960, size, size), hardswish)]


def efficientnet_b0() -> list[Layer]:
    """Table 1: (expansion factor, output, blocks, stride) of each stage of MBConv; the activation is SiLU (section 5.2)."""
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 40, 2, 2), (6, 80, 3, 2), (6, 112, 3, 1), (6, 192, 4, 2), (6, 320, 1, 1)]
    layers, channels, size = [Layer((32, 112, 112), "silu")], 32, 112
    for factor, output, blocks, stride in rows:
        for block in range(blocks):
            step = stride if block == 0 else 1
            layers += _inverted_bottleneck(channels, factor * channels, output, size, step, "silu")
            channels, size = output, size // step
    return [*layers, Layer((1280, size, size), "silu")]


def _inverted_bottleneck(
    channels: int, expansion: int, output: int, size: int, stride: int, activation: str
) -> list[Layer]:
    """Expand, depthwise, project (Sandler et al. 2018); where the shape stays, the input is added to a linear output."""
    small = size // stride
    expand = [] if expansion == channels else [Layer((expansion, size, size), activation)]
    project = Layer((output, small, small), None, residual=stride == 1 and channels == output)
    return [*expand, Layer((expansion, small, small), activation), project]


def densenet121() -> list[Layer]:
    """Table 1, growth rate 32: BN-ReLU-conv 1x1 (128) - BN-ReLU-conv 3x3 on the concatenation of all before."""
    layers, channels, size = [Layer((64, 112, 112))], 64, 56
    for stage, blocks in enumerate((6, 12, 24, 16)):
        for _ in range(blocks):
            layers += [Layer((channels, size, size)), Layer((128, size, size))]
            channels += 32
        if stage < 3:
            layers.append(Layer((channels, size, size)))  # transition
            channels, size = channels // 2, size // 2
    return [*layers, Layer((channels, size, size))]


def unet3d() -> list[Layer]:
    """Figure 2: tile 132 x 132 x 116, 3x3x3 convolutions without padding, BN before each ReLU; the output is 44 x 44 x 28."""
    layers, size = list[Layer](), (132, 132, 116)

    def convolve(channels: int) -> None:
        nonlocal size
        size = (size[0] - 2, size[1] - 2, size[2] - 2)
        layers.append(Layer((channels, *size)))

    for depth, channels in enumerate((32, 64, 128, 256)):
        convolve(channels)
        convolve(2 * channels)
        if depth < 3:
            size = (size[0] // 2, size[1] // 2, size[2] // 2)
    for channels in (256, 128, 64):
        size = (2 * size[0], 2 * size[1], 2 * size[2])
        convolve(channels)
        convolve(channels)
    assert size == (44, 44, 28)
    return layers


def conformer() -> list[Layer]:
    """Table 1, Conformer (L): 17 convolution modules of width 512, BN and Swish after the depthwise convolution.

    16 s of speech, a frame every 10 ms (section 3.1), subsampled by 4 (section 2): 400 positions.
    """
    return [Layer((512, 400), "silu")] * 17


def mlp() -> list[Layer]:
    """Fully connected layers, each with the batch it is trained with.

    Ioffe & Szegedy 2015, section 4.1: MNIST, three layers of 100, batch 60. The tutorial's 784-512-256-10 with batch 64.
    SimSiam (arXiv:2011.10566, section 3): batch 512, projector 2048-2048-2048, its last without ReLU, and predictor 512.
    BYOL (arXiv:2006.07733, section 3.3): batch 4096, one hidden layer of 4096 in projector and predictor.
    """
    simsiam = [Layer((2048,), batch=512)] * 2 + [Layer((2048,), None, batch=512), Layer((512,), batch=512)]
    byol = [Layer((4096,), batch=4096)] * 2
    return [Layer((100,), batch=60)] * 3 + [Layer((512,)), Layer((256,)), *simsiam, *byol]


def tiny() -> list[Layer]:
    """At most 64 KB of float32: layers above at batch 1 or 2, on images of 32 x 32 or less, where a call's fixed cost is the time."""
    images = [
        (2, (4, 3, 3)),
        (1, (16, 32, 32)),
        (1, (64, 14, 14)),
        (8, (16, 8, 8)),
        (1, (512, 4, 4)),
        (2, (32, 16, 16)),
    ]
    vectors = [(60, 100), (64, 256), (16, 512), (4, 2048)]
    return [Layer(shape, None, batch=batch) for batch, shape in images] + [
        Layer((width,), None, batch=batch) for batch, width in vectors
    ]


def sync() -> list[Layer]:
    """From the largest to the smallest: where the bytes are the time, and where the collectives are."""
    stages = [
        Layer((64, 112, 112)),
        *[Layer((64, 56, 56))] * 6,
        *[Layer((256, 14, 14))] * 11,
        *[Layer((2048, 7, 7), None)] * 4,
    ]
    return [*stages, Layer((512,), batch=64), Layer((16, 8, 8), None)]


HEADS = {
    "resnet50": (32, "He et al. 2015, arXiv:1512.03385, table 1"),
    "mobilenet_v3": (32, "Howard et al. 2019, arXiv:1905.02244, table 1 (Large)"),
    "efficientnet_b0": (32, "Tan & Le 2019, arXiv:1905.11946, table 1"),
    "densenet121": (16, "Huang et al. 2016, arXiv:1608.06993, table 1"),
    "unet3d": (1, "Cicek et al. 2016, arXiv:1606.06650, figure 2"),
    "conformer": (16, "Gulati et al. 2020, arXiv:2005.08100, table 1 (L); 16 s of speech"),
    "mlp": (64, "arXiv:1502.03167 section 4.1; arXiv:2011.10566; arXiv:2006.07733; 784-512-256-10"),
    "tiny": (2, "layers of the other files at the smallest batches and images"),
    "sync": (8, "layers of ResNet-50 (He et al. 2016, Table 1) and of an MLP, with the batch of one replica"),
}
THROUGH = {
    "tiny": 'through = "layer"  # times nn.BatchNorm*d against ours, not the functions below them',
    "sync": 'through = "replicas"  # times layers in two processes: torch\'s and ours alone, and ours synchronized',
}


def network(name: str) -> list[Layer]:
    """Every batch norm of a network, in order."""
    return globals()[name]()


def toml(name: str) -> str:
    """The file of a network: equal layers on one line, with their count."""
    batch, source = HEADS[name]
    lines = [f'name = "{name}"', f'source = "{source}"', f"batch = {batch}"]
    lines += [THROUGH[name]] if name in THROUGH else []
    lines += ["# shape: (C, *S), without the batch; count: layers that have it", "layers = ["]
    for layer, count in Counter(network(name)).items():
        fields = [f"shape = {list(layer.shape)}", f"count = {count}"]
        fields += [f'activation = "{layer.activation}"'] if layer.activation else []
        fields += ["residual = true"] if layer.residual else []
        fields += [f"batch = {layer.batch}"] if layer.batch else []
        lines.append(f"  {{ {', '.join(fields)} }},")
    return "\n".join([*lines, "]", ""])


if __name__ == "__main__":
    for name in HEADS:
        (SHAPES / f"{name}.toml").write_text(toml(name), encoding="utf-8")
        print(f"{name}: {len(network(name))} batch norms, {len(set(network(name)))} different")
