"""Batch norms in inference: an affine function of each channel, then perhaps an activation or submodules."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.folding.modules import Rest
from batchnorm.layers import BatchNorm
from batchnorm.statistics.contract import infers_by_running_statistics
from batchnorm.surgery import is_frozen_norm
from batchnorm.surgery.subclasses import rest_of_layer
from batchnorm.surgery.walker import is_watched


@dataclass(frozen=True)
class Affine:
    """y = scale · x + shift, channel by channel.

    Attributes:
        scale, shift: (C,), float64.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, norm: Any) -> Affine:
        """The affine function of a batch norm with running statistics."""
        mean, variance = _wide(norm.running_mean), _wide(norm.running_var)
        scale = (variance + getattr(norm, "eps", 1e-5)).rsqrt()
        if norm.weight is not None:
            scale = scale * _wide(norm.weight)
        shift = -mean * scale
        return cls(scale, shift if norm.bias is None else shift + _wide(norm.bias))

    def __call__(self, x: Tensor, axis: int) -> Tensor:
        """Apply the function to x with its channels on `axis`; the result has x's dtype."""
        shape = [-1 if at == axis else 1 for at in range(x.dim())]
        return (x.double() * self.scale.reshape(shape) + self.shift.reshape(shape)).to(x.dtype)


def scale_of(norm: Any) -> Tensor:
    """The factor of a batch norm in inference, (C,), in the dtype of its state; gradients reach its weight."""
    deviation = (norm.running_var + getattr(norm, "eps", 1e-5)).sqrt()
    return deviation.reciprocal() if norm.weight is None else norm.weight / deviation


def channel_axis_of(norm: nn.Module, rank: int) -> int:
    """The channel axis of a batch norm for input of this rank."""
    return (norm.channel_axis if isinstance(norm, BatchNorm) else 1) % rank


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm; the frozen batch norms of other libraries are included."""
    return isinstance(module, _BatchNorm) or is_frozen_norm(module)


def not_foldable(norm: Any, shape: tuple[int, ...], axis: int) -> str | None:
    """Why a batch norm with input of this shape is not an affine function followed by `rest_of`, or None if it is."""
    if is_watched(norm):
        return "it has hooks or a forward of its own"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if not norm.running_mean.is_floating_point():
        return "it is complex"
    if not infers_by_running_statistics(norm):
        return f"its statistics source is {norm.statistics!r}, which may change in inference"
    if axis >= len(shape) or shape[axis] != norm.running_mean.numel():
        return "its input has a different number of channels"
    if 0 in shape:
        return "its input is empty in the example"
    if type(norm).forward in (BatchNorm.forward, _BatchNorm.forward, nn.SyncBatchNorm.forward):
        return None
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(norm.running_mean)
    with torch.no_grad():
        found = copy.deepcopy(norm)(probe.clone())
        wanted = rest_of(norm)(Affine.of(norm)(probe, axis))
    if isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, 1e-4, 1e-4):
        return None
    return f"it is a {type(norm).__name__}, which computes something else"


def rest_of(norm: nn.Module, *, residual: bool = False) -> nn.Module:
    """A module for the operations after a batch norm's affine function: none, its activation, or its children in order."""
    named = [(name, child) for name, child in norm.named_children() if type(child) is not nn.Identity]
    children = [child for name, child in named if name != "parametrizations"]  # which compute its weights
    activation = norm.activation if isinstance(norm, BatchNorm) else None
    if not children and isinstance(norm, _BatchNorm) and not isinstance(norm, BatchNorm):
        found = rest_of_layer(norm)
        activation = None if isinstance(found, str) else found.activation
    if residual or activation is not None:
        return Rest(activation, *children)
    return children[0] if len(children) == 1 else nn.Sequential(*children) if children else nn.Identity()


def _wide(value: Tensor) -> Tensor:
    return value.detach().double()
