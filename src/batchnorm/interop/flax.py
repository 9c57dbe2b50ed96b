"""`flax.linen.BatchNorm` and `flax.nnx.BatchNorm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from batchnorm.errors import ArgumentError, InputError
from batchnorm.interop.numbers import Numbers, array, complement, entry, vector
from batchnorm.layers import BatchNorm

_REMEDY = "linen has params (scale, bias) and batch_stats (mean, var)"


class FlaxBatchNorm(NamedTuple):
    """Arguments and arrays of a Flax layer.

    Attributes:
        config: arguments of `linen.BatchNorm(use_running_average=..., **config)`, or of `nnx.BatchNorm(C, rngs=..., **config)`.
        params: arrays (C,): scale and bias, if the layer has them.
        batch_stats: arrays (C,): mean and var.
    """

    config: dict[str, Any]
    params: dict[str, Any]
    batch_stats: dict[str, Any]


def from_flax(layer: Any, *, momentum: float = 0.99, epsilon: float = 1e-5, axis: int = -1) -> BatchNorm:
    """Build a layer from a Flax `BatchNorm`; its running variance is biased.

    Args:
        layer: an `nnx.BatchNorm`; or the variables of a linen one, `{"params": {...}, "batch_stats": {...}}`, or one mapping of its arrays.
        momentum: Flax' argument, the weight of the old value; read from an nnx layer.
        epsilon: Flax' argument; read from an nnx layer.
        axis: Flax' argument; read from an nnx layer.

    Raises:
        InputError: if mean or var is missing.
        ShapeError: if arrays differ in size.
        ArgumentError: if they are not arrays.
    """
    if isinstance(layer, Mapping):
        arrays = {**layer.get("params", {}), **layer.get("batch_stats", {})} if "batch_stats" in layer else layer
    else:
        if not hasattr(layer, "use_running_average"):
            raise ArgumentError(
                f"layer must be an nnx.BatchNorm, or arrays by name, but got {type(layer).__name__}; for linen, pass the variables"
            )
        arrays = {
            name: value
            for name in ("scale", "bias", "mean", "var")
            if (value := getattr(layer, name, None)) is not None
        }
        arrays = {name: value[...] for name, value in arrays.items()}  # nnx keeps arrays in variables
        momentum, epsilon, axis = layer.momentum, layer.epsilon, layer.axis
    scale, offset = (None if arrays.get(name) is None else vector(arrays[name], name) for name in ("scale", "bias"))
    mean, variance = (vector(entry(arrays, name, _REMEDY), name) for name in ("mean", "var"))
    if not isinstance(axis, int):
        raise InputError(f"axis must be a single axis, but got {axis!r}; a layer of this library has one channel axis")
    return Numbers(scale, offset, mean, variance, epsilon, complement(momentum), axis).build()


def to_flax(layer: nn.Module) -> FlaxBatchNorm:
    """Arguments and arrays of a Flax `BatchNorm` with a layer's numbers. Flax will update the variance by biased ones.

    Raises:
        ArgumentError, StateError, InputError: if the layer has no counterpart, as in `Numbers.of`.
    """
    numbers = Numbers.of(layer)
    config = {
        "momentum": complement(numbers.momentum),
        "epsilon": numbers.eps,
        "axis": numbers.channel_axis,
        "use_scale": numbers.scale is not None,
        "use_bias": numbers.offset is not None,
    }
    params = {
        name: array(value) for name, value in (("scale", numbers.scale), ("bias", numbers.offset)) if value is not None
    }
    return FlaxBatchNorm(config, params, {"mean": array(numbers.mean), "var": array(numbers.variance)})
