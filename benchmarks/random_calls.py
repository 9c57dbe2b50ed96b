"""Random layer calls, a hash of each one's results: what two commits, or two builds, must have in common to the last bit.

    python benchmarks/random_calls.py --calls 500 > before.txt     # in a checkout of one commit
    python benchmarks/random_calls.py --calls 500 > after.txt      # and of the other: cmp before.txt after.txt

Each call has a random statistics source, dtype, layout, size, mask, activation, residual and mode; hashed are the output, the gradients
and the buffers. `--kernel eager` runs them on plain torch operators, and BATCHNORM_INSTRUCTION_SET chooses among the C++ builds.
"""

from __future__ import annotations

import argparse
import hashlib
import random

import torch
from torch import Tensor

import batchnorm as bn
from batchnorm import kernels
from batchnorm.kernels import eager
from batchnorm.kernels.activation import NAMES
from batchnorm.statistics import Batch, Domains, Ghost, MovingAverage, Renorm, Running

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SPATIAL = ((), (7,), (130,), (7, 7), (14, 14), (3, 29), (3, 4, 5), (1200,), (1, 1))
SOURCES = (Batch, Batch, Batch, lambda: Ghost(3), Renorm, MovingAverage, Running, lambda: Domains(("a", "b")))


def one_call(number: int) -> str:
    """The hash of call `number`, which depends on nothing else."""
    chosen = random.Random(number)
    torch.manual_seed(number)
    n, channels, spatial = chosen.choice((2, 3, 8, 9, 33)), chosen.choice((1, 3, 16, 65)), chosen.choice(SPATIAL)
    dtype, source, activation = chosen.choice(DTYPES), chosen.choice(SOURCES), chosen.choice((None, *NAMES))
    layer = bn.BatchNorm(channels, activation=activation, statistics=source(), affine=chosen.random() < 0.8)
    layer.train(chosen.random() < 0.75)
    if dtype is torch.float64:
        layer.double()
    if layer.affine and chosen.random() < 0.3:
        layer.to(torch.float64 if dtype is torch.float64 else torch.float32)
    shape = (n, channels, *spatial)
    inputs = [(torch.randn(shape) * 2 + chosen.choice((0, 3, 500))).to(dtype), torch.randn(shape).to(dtype)]
    if len(shape) == 4 and chosen.random() < 0.5:
        inputs = [value.contiguous(memory_format=torch.channels_last) for value in inputs]
    x, residual = (value.requires_grad_(chosen.random() < 0.8) for value in inputs)
    mask = torch.rand(n, *spatial) < 0.7 if chosen.random() < 0.4 and source not in SOURCES[3:6] else None
    results: list[Tensor] = []
    for _ in range(2):  # the second call finds buffers that the first one wrote
        y = layer(x, residual=residual if number % 3 else None, mask=mask)
        results.append(y)
        if y.requires_grad:
            y.backward(torch.randn(y.shape).to(y.dtype))
    results += [value.grad for value in (x, residual, *layer.parameters()) if value.grad is not None]
    return digest([*results, *layer.buffers()])


def digest(tensors: list[Tensor]) -> str:
    """Of their values' bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    """Print a line for each call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--kernel", choices=("cpu", "eager"), default="cpu")
    arguments = parser.parse_args()
    if arguments.kernel == "eager":
        kernels.KERNELS = (eager,)
    torch.set_num_threads(2)
    for number in range(arguments.calls):
        try:
            print(number, one_call(number))
        except (ValueError, RuntimeError, TypeError) as error:
            print(number, type(error).__name__)


if __name__ == "__main__":
    main()
