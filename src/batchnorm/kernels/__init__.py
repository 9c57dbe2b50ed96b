"""One door to the kernels: an ordered list, the first that takes a call computes it, plain torch last."""

from __future__ import annotations

from torch import Tensor

from batchnorm.kernels import cpu, eager
from batchnorm.kernels.activation import Activation, from_module, parse
from batchnorm.kernels.contract import Backward, Epilogue, Groups, Kernel
from batchnorm.kernels.correction import Correction, Renormalization

KERNELS: tuple[Kernel, ...] = (cpu, eager)


def select(x: Tensor, epilogue: Epilogue) -> Kernel:
    """The first kernel of `KERNELS` that takes this call."""
    for kernel in KERNELS:
        if kernel.refuses(x, epilogue) is None:
            return kernel
    raise AssertionError("eager refuses nothing")


__all__ = [
    "KERNELS",
    "Activation",
    "Backward",
    "Correction",
    "Epilogue",
    "Groups",
    "Kernel",
    "Renormalization",
    "from_module",
    "parse",
    "select",
]
