"""A batch norm of any library: scale, offset, running statistics, and three settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentError, InputError, ShapeError, StateError
from batchnorm.layers import BatchNorm
from batchnorm.statistics import Batch, Running


@dataclass(frozen=True)
class Numbers:
    """The numbers of a batch norm, independent of the conventions of a library.

    Attributes:
        scale: (C,), or None.
        offset: (C,), or None.
        mean: the mean in inference, (C,).
        variance: the variance in inference, (C,).
        eps: added to the variance.
        momentum: the weight of the new value.
        channel_axis: the channel axis of the input.
    """

    scale: Tensor | None
    offset: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float
    momentum: float
    channel_axis: int

    def __post_init__(self) -> None:
        for name in ("eps", "momentum"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), Real):
                raise ArgumentError(f"{name} must be a number, but got {getattr(self, name)!r}")
        sizes = {
            name: tuple(getattr(self, name).shape)
            for name in ("scale", "offset", "mean", "variance")
            if getattr(self, name) is not None
        }
        if len(set(sizes.values())) > 1 or len(sizes["mean"]) != 1:
            raise ShapeError(f"the numbers of a batch norm must be vectors of one size, but they are {sizes}")

    def build(self) -> BatchNorm:
        """Build a layer with these numbers; its running variance is biased, as in the other libraries.

        Without a scale, the weight is 1 and frozen; without an offset, there is no bias.
        """
        affine = self.scale is not None or self.offset is not None
        layer = BatchNorm(
            len(self.mean),
            self.eps,
            self.momentum,
            affine=affine,
            bias=self.offset is not None,
            channel_axis=self.channel_axis,
            running_variance="biased",
        )
        dtype = next(value.dtype for value in (self.scale, self.offset, self.mean) if value is not None)
        if affine:
            scale = torch.ones_like(self.mean, dtype=dtype) if self.scale is None else self.scale
            layer.register_parameter("weight", nn.Parameter(scale.clone()))
        if self.offset is not None:
            layer.register_parameter("bias", nn.Parameter(self.offset.clone()))
        for name, value in (("running_mean", self.mean), ("running_var", self.variance)):
            layer.register_buffer(name, value.to(torch.promote_types(value.dtype, torch.float32), copy=True))
        if affine and self.scale is None:
            layer.weight.requires_grad_(False)
        return layer

    @classmethod
    def of(cls, layer: nn.Module) -> Numbers:
        """Read the numbers of a batch norm of this library or of torch.

        Raises:
            ArgumentError: if it is not a batch norm.
            StateError: if it has no running statistics, or is lazy and has not had its first input.
            InputError: if it uses a feature that layers of other libraries do not have.
        """
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ArgumentError(f"layer must be a batch norm, but got {type(layer).__name__}")
        if layer.running_mean is None or layer.running_var is None or is_lazy(layer.running_mean):
            raise StateError(
                "layers of other libraries have running statistics, but this one has none; build it with track_running_stats=True, and "
                "call a lazy layer once"
            )
        if layer.momentum is None:
            raise InputError(
                "momentum must be a number, since other libraries cannot average over all batches, but it is None; set it"
            )
        if isinstance(layer, BatchNorm):
            beyond = [
                text
                for text, is_so in (
                    (f"the activation {layer.activation}", layer.activation is not None),
                    (f"the statistics {layer.statistics}", not isinstance(layer.statistics, Batch | Running)),
                )
                if is_so
            ]
            if beyond:
                raise InputError(
                    f"layers of other libraries do not have {' and '.join(beyond)}; reset it to the default, and apply it separately"
                )
        scale, offset = (None if value is None else value.detach().clone() for value in (layer.weight, layer.bias))
        return cls(
            scale,
            offset,
            layer.running_mean.detach().clone(),
            layer.running_var.detach().clone(),
            layer.eps,
            layer.momentum,
            layer.channel_axis if isinstance(layer, BatchNorm) else 1,
        )


def complement(momentum: Any) -> float:
    """1 - momentum in decimal: 0.1 for 0.9, where floating point gives 0.09999999999999998.

    Raises:
        ArgumentError: if it is not a number.
    """
    if isinstance(momentum, bool) or not isinstance(momentum, Real):
        raise ArgumentError(f"momentum must be a number, but got {momentum!r}")
    return float(1 - Decimal(repr(float(momentum))))


def vector(value: Any, name: str) -> Tensor:
    """Copy an array of any library, (C,) with any axes of size 1, to a floating-point tensor (C,); integers become float32.

    Raises:
        ArgumentError: if it is not an array of numbers.
        ShapeError: if it has another shape.
    """
    try:
        tensor = value.detach().clone() if isinstance(value, Tensor) else _tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} must be an array of numbers, but got {type(value).__name__}: {error}") from error
    if sum(size != 1 for size in tensor.shape) > 1:
        raise ShapeError(f"{name} must have one number for each channel, but its shape is {tuple(tensor.shape)}")
    return (tensor if tensor.is_floating_point() else tensor.float()).reshape(-1)


def _tensor(value: Any) -> Tensor:
    if not hasattr(value, "__array__"):
        return torch.tensor(value)
    import numpy

    values = numpy.array(value)
    if values.dtype.name == "bfloat16":  # a type of ml_dtypes, which torch does not know; the bits are the same
        return torch.from_numpy(values.view(numpy.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def array(value: Tensor) -> Any:
    """Copy a tensor to a numpy array; bfloat16, which numpy lacks, becomes float32, which is exact."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()


def entry(arrays: Mapping[str, Any], name: str, remedy: str) -> Any:
    """The entry of a mapping with this name.

    Raises:
        InputError: if there is none.
    """
    if name not in arrays:
        raise InputError(f"{name!r} must be among the arrays, but there are only {sorted(map(str, arrays))}; {remedy}")
    return arrays[name]
