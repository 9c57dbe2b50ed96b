"""`keras.layers.BatchNormalization`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.interop.numbers import Numbers, array, complement, entry, vector
from batchnorm.layers import BatchNorm


class KerasBatchNorm(NamedTuple):
    """Arguments and arrays of a Keras layer: call `BatchNormalization(**config)`, build it for its input, then `set_weights(weights)`.

    Attributes:
        config: arguments of its constructor.
        weights: arrays (C,): gamma, beta, moving_mean, moving_variance; without gamma or beta if the layer has none.
    """

    config: dict[str, Any]
    weights: list[Any]


def from_keras(layer: Any, *, axis: int = -1, momentum: float = 0.99, epsilon: float = 1e-3) -> BatchNorm:
    """Build a layer from a Keras `BatchNormalization`; its running variance is biased.

    Args:
        layer: the Keras layer, built; or its arrays by name: `moving_mean`, `moving_variance`, and `gamma` and `beta` if it has them.
        axis: Keras' argument; read from a Keras layer.
        momentum: Keras' argument, the weight of the old value; read from a Keras layer.
        epsilon: Keras' argument; read from a Keras layer.

    Raises:
        InputError: if moving_mean or moving_variance is missing; if the layer renormalizes (`renorm=True` of Keras 2).
        StateError: if the layer is not built.
        ShapeError: if arrays differ in size.
        ArgumentError: if it is neither, or they are not arrays.
    """
    if isinstance(layer, Mapping):
        arrays = layer
    else:
        if not hasattr(layer, "get_config") or not hasattr(layer, "get_weights"):
            raise ArgumentError(f"layer must be a Keras layer or its arrays by name, but got {type(layer).__name__}")
        config = layer.get_config()
        if config.get("renorm"):
            raise InputError(
                "a Keras layer with renorm=True must be built by hand: bn.BatchNorm(..., statistics=Renorm(...))"
            )
        axis, momentum, epsilon = config["axis"], config["momentum"], config["epsilon"]
        axis = axis[0] if isinstance(axis, list | tuple) else axis
        names = [name for name, has in (("gamma", config["scale"]), ("beta", config["center"])) if has]
        weights = layer.get_weights()
        names += ["moving_mean", "moving_variance"]
        if len(weights) != len(names):
            raise StateError("a Keras layer must be built before its numbers can be read, but it is not; call it once")
        arrays = dict(zip(names, weights, strict=True))
    scale, offset = (None if arrays.get(name) is None else vector(arrays[name], name) for name in ("gamma", "beta"))
    mean, variance = (
        vector(entry(arrays, name, "Keras has moving_mean and moving_variance"), name)
        for name in ("moving_mean", "moving_variance")
    )
    return Numbers(scale, offset, mean, variance, epsilon, complement(momentum), axis).build()


def to_keras(layer: nn.Module) -> KerasBatchNorm:
    """Arguments and arrays of a Keras `BatchNormalization` with a layer's numbers. Keras will update the variance by biased ones.

    Raises:
        ArgumentError, StateError, InputError: if the layer has no counterpart, as in `Numbers.of`.
    """
    numbers = Numbers.of(layer)
    config = {
        "axis": numbers.channel_axis,
        "momentum": complement(numbers.momentum),
        "epsilon": numbers.eps,
        "center": numbers.offset is not None,
        "scale": numbers.scale is not None,
    }
    values = (numbers.scale, numbers.offset, numbers.mean, numbers.variance)
    return KerasBatchNorm(config, [array(value) for value in values if value is not None])
