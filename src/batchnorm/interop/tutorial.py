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

_AFFINE = ("gamma", "beta")
_STATISTICS = (
    ("running_mean", "running_var"),
    ("moving_mean", "moving_var"),
)  # the second as in Dive into Deep Learning


def is_hand_written(layer: nn.Module) -> bool:
    """Whether a module is a hand-written batch norm: not torch's or ours, with gamma, beta and running statistics of one size."""
    if isinstance(layer, _BatchNorm):  # ours have gamma and beta too
        return False
    numbers = [getattr(layer, name, None) for name in hand_written_names(layer)]
    sizes = {value.numel() if isinstance(value, Tensor) and not is_lazy(value) else None for value in numbers}
    return len(sizes) == 1 and None not in sizes


def hand_written_names(layer: Any) -> tuple[str, str, str, str]:
    """The attributes of scale, offset, mean and variance of a hand-written batch norm; torch's names for statistics that it lacks."""
    return (*_AFFINE, *_statistics_of(layer))


def from_tutorial(layer: Any, *, eps: float | None = None, momentum: float | None = None) -> BatchNorm:
    """Build a layer from a hand-written one whose momentum is the weight of the new value, and whose running variance is biased.

    The running statistics become buffers. In a hand-written layer they are not, and may hold the autograd graphs of all batches.

    Args:
        layer: has gamma, beta, and running_mean and running_var or moving_mean and moving_var.
        eps: the layer's attribute if None.
        momentum: the layer's attribute if None.

    Raises:
        ArgumentError: if an attribute is missing, or not an array.
    """
    statistics = _check(layer, *(name for name, value in (("eps", eps), ("momentum", momentum)) if value is None))
    gamma, beta, mean, variance = (vector(getattr(layer, name), name) for name in (*_AFFINE, *statistics))
    if eps is None:
        eps = float(layer.eps)
    if momentum is None:
        momentum = float(layer.momentum)
    return Numbers(gamma, beta, mean, variance, eps, momentum, 1).build()


def to_tutorial(layer: nn.Module, target: Any) -> Any:
    """Copy the numbers of one of our or torch's layers into a hand-written one, in place, and return it.

    Raises:
        ArgumentError: if the target lacks an attribute.
        ArgumentError, StateError, InputError: if the layer has no counterpart, as in `Numbers.of`.
    """
    mean, variance = _check(target)
    numbers = Numbers.of(layer)
    ones, zeros = torch.ones_like(numbers.mean), torch.zeros_like(numbers.mean)
    with torch.no_grad():
        target.gamma.copy_((ones if numbers.scale is None else numbers.scale).view_as(target.gamma))
        target.beta.copy_((zeros if numbers.offset is None else numbers.offset).view_as(target.beta))
    for name, value in ((mean, numbers.mean), (variance, numbers.variance)):
        setattr(target, name, value.view_as(getattr(target, name)))
    target.eps, target.momentum = numbers.eps, numbers.momentum
    return target


def _statistics_of(layer: Any) -> tuple[str, str]:
    """The names of its running statistics; torch's names if it has none."""
    return next((names for names in _STATISTICS if any(hasattr(layer, name) for name in names)), _STATISTICS[0])


def _check(layer: Any, *arguments: str) -> tuple[str, str]:
    """The names of the running statistics of a layer that has everything, and these arguments as attributes."""
    statistics = _statistics_of(layer)
    missing = [name for name in (*_AFFINE, *statistics, *arguments) if not hasattr(layer, name)]
    if missing:
        wanted = ", ".join((*_AFFINE, *statistics, *arguments))
        pass_them = "" if set(missing) - {*arguments} else f"; pass {' and '.join(f'{name}=' for name in missing)}"
        raise ArgumentError(
            f"a hand-written layer must have {wanted}, but {type(layer).__name__} lacks {', '.join(missing)}{pass_them}"
        )
    return statistics
