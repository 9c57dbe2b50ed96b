"""One door to the kernels: an ordered list, the first that takes a call computes it, plain torch last."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels import aten, cpu, eager, gpu
from batchnorm.kernels.activation import Activation, from_module, parse
from batchnorm.kernels.contract import (
    Backward,
    Epilogue,
    Forward,
    Groups,
    Kernel,
    Normalized,
    Running,
    Step,
    Steps,
    Update,
)
from batchnorm.kernels.correction import Correction, Renormalization
from batchnorm.moments import Moments

KERNELS: tuple[Kernel, ...] = (cpu, gpu, aten, eager)


def select(x: Tensor, epilogue: Epilogue, plain: bool = True) -> Kernel:
    """The first kernel of `KERNELS` that accepts this call; in compiled code `aten`, if it does, for a compiler fuses torch's operators.

    `plain` says whether the batch is normalized by its own statistics alone, or by running statistics.
    """
    if torch.compiler.is_compiling() and aten in KERNELS and aten.refuses(x, epilogue, plain) is None:
        return aten
    for kernel in KERNELS:
        if kernel.refuses(x, epilogue, plain) is None:
            return kernel
    raise AssertionError("eager refuses nothing")


def select_update(running: Running, moments: Moments, update: Update) -> Kernel:
    """The first kernel of `KERNELS` that updates these running statistics."""
    for kernel in KERNELS:
        if kernel.takes_update(running, moments, update):
            return kernel
    raise AssertionError("eager takes every update")


def steps_for(x: Tensor, running_mean: Tensor) -> Steps | None:
    """The one-operator calls for these tensors, by the C++ library or Triton; None without them: torch's operators have none."""
    for kernel in (cpu, gpu):
        steps = kernel.steps_for(x, running_mean) if kernel in KERNELS else None
        if steps is not None:
            return steps
    return None


__all__ = [
    "KERNELS",
    "Activation",
    "Backward",
    "Correction",
    "Epilogue",
    "Forward",
    "Groups",
    "Kernel",
    "Normalized",
    "Renormalization",
    "Running",
    "Step",
    "Steps",
    "Update",
    "from_module",
    "parse",
    "select",
    "select_update",
    "steps_for",
]
