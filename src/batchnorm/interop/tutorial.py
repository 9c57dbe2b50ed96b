"""Hand-written layers, as in tutorials: gamma, beta, and running statistics that are plain attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentError
from batchnorm.interop.numbers import Numbers, vector
from batchnorm.layers import BatchNorm

_NUMBERS = ("gamma", "beta", "running_mean", "running_var")
_WANTED = (*_NUMBERS, "eps", "momentum")


def is_hand_written(layer: nn.Module) -> bool:
    """Whether a module is a hand-written batch norm: not torch's or ours, with gamma, beta and running statistics of one size."""
    if isinstance(layer, _BatchNorm):  # ours have gamma and beta too
        return False
    numbers = [getattr(layer, name, None) for name in _NUMBERS]
    sizes = {value.numel() if isinstance(value, Tensor) and not is_lazy(value) else None for value in numbers}
    return len(sizes) == 1 and None not in sizes


def from_tutorial(layer: Any) -> BatchNorm:
    """Build a layer from a hand-written one whose momentum is the weight of the new value, and whose running variance is biased.

    The running statistics become buffers. In a hand-written layer they are not, and may hold the autograd graphs of all batches.

    Raises:
        ArgumentError: if an attribute is missing, or not an array.
    """
    _check(layer)
    gamma, beta, mean, variance = (vector(getattr(layer, name), name) for name in _NUMBERS)
    return Numbers(gamma, beta, mean, variance, layer.eps, layer.momentum, 1).build()


def to_tutorial(layer: nn.Module, target: Any) -> Any:
    """Copy the numbers of one of our or torch's layers into a hand-written one, in place, and return it.

    Raises:
        ArgumentError: if the target lacks an attribute.
        ArgumentError, StateError, InputError: if the layer has no counterpart, as in `Numbers.of`.
    """
    _check(target)
    numbers = Numbers.of(layer)
    ones, zeros = torch.ones_like(numbers.mean), torch.zeros_like(numbers.mean)
    with torch.no_grad():
        target.gamma.copy_(ones if numbers.scale is None else numbers.scale)
        target.beta.copy_(zeros if numbers.offset is None else numbers.offset)
    target.running_mean, target.running_var = numbers.mean, numbers.variance
    target.eps, target.momentum = numbers.eps, numbers.momentum
    return target


def _check(layer: Any) -> None:
    missing = [name for name in _WANTED if not hasattr(layer, name)]
    if missing:
        raise ArgumentError(
            f"a hand-written layer must have {', '.join(_WANTED)}, but {type(layer).__name__} lacks {', '.join(missing)}"
        )
