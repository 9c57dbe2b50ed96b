"""`haiku.BatchNorm`, whose averages begin at 0 and are corrected for it."""

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
    """What a Haiku layer is made of.

    Attributes:
        config: arguments of `haiku.BatchNorm(**config)`.
        params: arrays of the input's rank with all axes but the channels' of size 1: scale and offset, those that the layer has.
        state: of `mean_ema` and of `var_ema`: `hidden`, `average`, as params, and `counter`, 0-d.
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
    """A layer that infers as a Haiku `BatchNorm` does, and whose running variance is biased.

    Its running statistics are Haiku's corrected averages, and move from there by `decay_rate`. Haiku's own go on from their uncorrected
    sums, which agree once 1 - decay_rate^counter is 1.

    Args:
        params: the layer's: `scale` and `offset`, where it has them.
        state: by name, ending in `mean_ema` and `var_ema` ("batch_norm/~/mean_ema"): mappings with `average`, and `counter`.
        decay_rate: Haiku's argument, the weight of what was.
        eps: Haiku's argument.
        channel_axis: -1, or 1 for `data_format="channels_first"`.

    Raises:
        InputError: if an average is missing.
        ShapeError: if arrays differ in size.
        ArgumentError: if they are no arrays.
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
    """What a Haiku `BatchNorm` with a layer's numbers is made of. Its own updates of the variance are biased.

    Args:
        layer: of ours or of torch's.
        dimensions: of its input, 4 for images; Haiku's arrays have as many.

    Raises:
        ArgumentError, StateError, InputError: if the layer has no counterpart, as `Numbers.of`; if dimensions is below 2.
    """
    numbers = Numbers.of(layer)
    if not isinstance(dimensions, int) or dimensions < 2:
        raise InputError(f"dimensions must be the input's, at least 2 (batch and channels), but got {dimensions!r}")
    axis = numbers.channel_axis % dimensions
    shape = [-1 if one == axis else 1 for one in range(dimensions)]
    decay = complement(numbers.momentum)
    counter = int(getattr(layer, "num_batches_tracked", None) or 0)

    def average(value: Tensor) -> dict[str, Any]:
        begun = 1 - decay**counter  # Haiku's correction: average = hidden / begun
        hidden = (value.double() * begun).to(value.dtype).view(shape)
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
        raise InputError(f"Haiku has the channels on axis 1 or the last one, but they are on axis {axis}; move them")
    values = (("scale", numbers.scale), ("offset", numbers.offset))
    params = {name: array(value.view(shape)) for name, value in values if value is not None}
    return HaikuBatchNorm(
        config, params, dict(zip(_AVERAGES, map(average, (numbers.mean, numbers.variance)), strict=True))
    )
