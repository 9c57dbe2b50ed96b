"""What an autograd node in Python costs a tiny layer: the reason why a node of torch's own records a small training step.

    python benchmarks/node_cost.py    # ten seconds on one core; prints the table, writes the rows

Each arm is a training step of a layer, forward and backward, on a tensor of `SHAPE`: torch's layer; ours; ours without the look at
whether the batch is finite; ours recorded by our node in Python, as large tensors are; and torch's own operators within such a node.
Without the C++ library ours is torch's operator in torch's node, and the look is what it takes more. Arms take turns; times are of this
thread alone.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm as bn
import rows
from batchnorm import env
from batchnorm.functional import fast_path

RESULTS = Path(__file__).parent / "results" / "node_cost.csv"
SHAPE = (2, 4, 3, 3)
TURNS, STEPS = 100, 200


@dataclass(frozen=True)
class Row:
    """One arm.

    Attributes:
        arm: what the step is of.
        p20_us, p50_us, p80_us: time of a step over the turns.
        vs_torch: torch's median by this one's.
        machine: processor.
        torch: version.
        date: of the measurement.
    """

    arm: str
    p20_us: float
    p50_us: float
    p80_us: float
    vs_torch: float
    machine: str
    torch: str
    date: str


class NodeInPython(torch.autograd.Function):
    """Torch's operators, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, 0.1, 1e-5)
        ctx.save_for_backward(x, weight, mean, rstd, running_mean, running_var)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, mean, rstd, running_mean, running_var = ctx.saved_tensors
        backward = torch.ops.aten.native_batch_norm_backward.default
        found = backward(*grads, x, weight, running_mean, running_var, mean, rstd, True, 1e-5, [True] * 3)
        return (*found, None, None)


class OursWithNodeInPython(bn.BatchNorm2d):
    """Our layer with the node of large tensors."""

    def forward(self, input: Tensor) -> Tensor:
        most, fast_path.MOST_IN_TORCHS_NODE = fast_path.MOST_IN_TORCHS_NODE, -1
        try:
            return super().forward(input)
        finally:
            fast_path.MOST_IN_TORCHS_NODE = most


class WithNodeInPython(nn.BatchNorm2d):
    """Torch's layer in training, with a node in Python."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return NodeInPython.apply(input, self.weight, self.bias, self.running_mean, self.running_var)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=TURNS, help="turns of each arm")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="rows to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    layers = {
        "torch's layer": nn.BatchNorm2d(SHAPE[1]),
        "ours": bn.BatchNorm2d(SHAPE[1]),
        "ours, on_nonfinite='propagate'": bn.BatchNorm2d(SHAPE[1], on_nonfinite="propagate"),
        "ours, in a node in Python": OursWithNodeInPython(SHAPE[1]),
        "torch's operators in a node in Python": WithNodeInPython(SHAPE[1]),
    }
    times: dict[str, list[float]] = {arm: [] for arm in layers}
    for _ in range(arguments.turns):
        for arm, layer in layers.items():
            layer(x).backward(dy)
            start = time.thread_time()
            for _ in range(STEPS):
                layer(x).backward(dy)
            times[arm].append((time.thread_time() - start) / STEPS * 1e6)
    percentiles = {arm: quantiles(values, n=10)[1::3] for arm, values in times.items()}
    base = percentiles["torch's layer"][1]
    machine, today = env.machine().cpu, datetime.now(UTC).date().isoformat()
    found = [
        Row(arm, p20, p50, p80, base / p50, machine, torch.__version__, today)
        for arm, (p20, p50, p80) in percentiles.items()
    ]
    rows.write(arguments.csv, found)
    for row in found:
        print(
            f"{row.arm:<38} {row.p50_us:6.1f} µs ({row.p20_us:.1f} to {row.p80_us:.1f})  {row.vs_torch:.2f} of torch's speed"
        )


if __name__ == "__main__":
    main()
