"""Converts from and to `haiku.BatchNorm`, which corrects its averages for their start at 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError
from batchnorm.interop.numbers import Numbers, array, complement, entry, vector
from batchnorm.layers import BatchNorm

_AVERAGES = ("mean_ema", "var_ema")


class HaikuBatchNorm(NamedTuple):
    """Arguments and arrays of a Haiku layer.

    Attributes:
        config: arguments of `haiku.BatchNorm(**config)`.
        params: scale and offset, if the layer has them; arrays of the input's rank, of size 1 on all axes except the channel axis.
        state: for `mean_ema` and `var_ema`: `hidden` and `average`, shaped like params, and `counter`, 0-d.
    """

    config: dict[str, Any]
    params: dict[str, Any]
    state: dict[str, dict[str, Any]]


def from_haiku(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    decay_rate: float,
    eps: float = 1e-5,
    channel_axis: int = -1,
) -> BatchNorm:
    """Build a layer with the same inference as a Haiku `BatchNorm`; its running variance is biased.

    Its running statistics start at Haiku's corrected averages and are updated with `decay_rate`. Haiku updates its uncorrected averages,
    which differ until decay_rate^counter is negligible.

    Args:
        params: the layer's `scale` and `offset`, if it has them.
        state: mappings with `average` and `counter`, under names that end in `mean_ema` and `var_ema` ("batch_norm/~/mean_ema").
        decay_rate: Haiku's argument, the weight of the old value.
        eps: Haiku's argument.
        channel_axis: -1, or 1 for `data_format="channels_first"`.

    Raises:
        InputError: if an average is missing.
        ShapeError: if arrays differ in size.
        ArgumentError: if they are not arrays.
    """
    named = {str(name).rpartition("/")[2]: value for name, value in state.items()}
    averages = [entry(named, name, "Haiku's state has mean_ema and var_ema") for name in _AVERAGES]
    mean, variance = (
        vector(entry(average, "average", "hidden alone is not corrected"), "average") for average in averages
    )
    scale, offset = (None if params.get(name) is None else vector(params[name], name) for name in ("scale", "offset"))
    layer = Numbers(scale, offset, mean, variance, eps, complement(decay_rate), channel_axis).build()
    counter = averages[0].get("counter")
    if counter is not None and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(int(counter))
    return layer


def to_haiku(layer: nn.Module, *, dimensions: int) -> HaikuBatchNorm:
    """Convert a layer to the arguments and arrays of a Haiku `BatchNorm`, which averages biased variances.

    Args:
        layer: a batch norm of this library or of torch.
        dimensions: number of axes of its input, 4 for images; Haiku's arrays have the same number.

    Raises:
        ArgumentError, StateError, InputError: if the layer has no counterpart, as in `Numbers.of`; if dimensions is below 2.
    """
    numbers = Numbers.of(layer)
    if not isinstance(dimensions, int) or dimensions < 2:
        raise InputError(f"dimensions must be the number of axes of the input, at least 2, but got {dimensions!r}")
    axis = numbers.channel_axis % dimensions
    shape = [-1 if one == axis else 1 for one in range(dimensions)]
    decay = complement(numbers.momentum)
    counter = int(getattr(layer, "num_batches_tracked", None) or 0)

    def average(value: Tensor) -> dict[str, Any]:
        correction = 1 - decay**counter  # in Haiku, average = hidden / correction
        hidden = (value.double() * correction).to(value.dtype).view(shape)
        return {
            "hidden": array(hidden),
            "average": array(value.view(shape)),
            "counter": array(torch.tensor(counter, dtype=torch.int32)),
        }

    config = {
        "create_scale": numbers.scale is not None,
        "create_offset": numbers.offset is not None,
        "decay_rate": decay,
        "eps": numbers.eps,
        "data_format": "channels_last" if axis == dimensions - 1 else "channels_first",
    }
    if axis not in (1, dimensions - 1):
        raise InputError(f"Haiku's channel axis must be 1 or the last, but the layer's is {axis}; transpose the input")
    values = (("scale", numbers.scale), ("offset", numbers.offset))
    params = {name: array(value.view(shape)) for name, value in values if value is not None}
    return HaikuBatchNorm(
        config, params, dict(zip(_AVERAGES, map(average, (numbers.mean, numbers.variance)), strict=True))
    )
