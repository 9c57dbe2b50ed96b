"""ONNX's `BatchNormalization` nodes and their initializers."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from batchnorm.errors import ArgumentError, InputError, MissingExtraError
from batchnorm.interop.numbers import Numbers, array, complement, vector
from batchnorm.layers import BatchNorm

_INPUTS = ("scale", "B", "input_mean", "input_var")


class OnnxBatchNorm(NamedTuple):
    """A `BatchNormalization` node of opset 15 or later, and its initializers.

    Attributes:
        node: a NodeProto from `x` to `y`, in inference.
        initializers: TensorProtos (C,) named `<name>.scale`, `.B`, `.input_mean`, `.input_var`.
    """

    node: Any
    initializers: list[Any]


def from_onnx(model: Any) -> dict[str, BatchNorm]:
    """Build a layer from each `BatchNormalization` node of an ONNX model.

    The keys are the names of the nodes, or of their outputs if a name is empty or not unique.

    Args:
        model: a ModelProto, or the path of a file.

    Raises:
        MissingExtraError: if onnx is not installed.
        ArgumentError: if it is neither.
        InputError: if the file cannot be read, or the numbers of a node are not initializers.
    """
    onnx = _onnx()
    if isinstance(model, str | Path):
        try:
            model = onnx.load(str(model))
        except Exception as error:  # protobuf's and the operating system's
            raise InputError(f"{model} must be an ONNX file: {type(error).__name__}: {error}") from error
    if not hasattr(model, "graph"):
        raise ArgumentError(f"model must be an ONNX model or its file, but got {type(model).__name__}")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = dict[str, BatchNorm]()
    for node in model.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        name = node.name if node.name and node.name not in layers else node.output[0]  # names of outputs are unique
        missing = [of for of in node.input[1:5] if of not in stored]
        if missing:
            raise InputError(
                f"{name}: numbers must be initializers, but {', '.join(missing)} are not; fold constants first"
            )
        numbers = [vector(onnx.numpy_helper.to_array(stored[of]).copy(), of) for of in node.input[1:5]]
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        epsilon, momentum = (
            _shortest(attributes.get(key, default)) for key, default in (("epsilon", 1e-5), ("momentum", 0.9))
        )
        scale, offset, mean, variance = numbers
        layers[name] = Numbers(scale, offset, mean, variance, epsilon, complement(momentum), 1).build()
    return layers


def to_onnx(layer: nn.Module, name: str = "batch_norm") -> OnnxBatchNorm:
    """Build a `BatchNormalization` node with a layer's numbers. ONNX needs a scale and an offset: 1 and 0 if the layer has none.

    Raises:
        MissingExtraError: if onnx is not installed.
        ArgumentError, StateError, InputError: if the layer has no counterpart, as in `Numbers.of`; if its channels are not on axis 1.
    """
    onnx = _onnx()
    numbers = Numbers.of(layer)
    if numbers.channel_axis != 1:
        raise InputError(
            f"ONNX has the channels on axis 1, but they are on axis {numbers.channel_axis}; transpose before and after the node"
        )
    scale = torch.ones_like(numbers.mean) if numbers.scale is None else numbers.scale
    offset = torch.zeros_like(numbers.mean) if numbers.offset is None else numbers.offset
    initializers = [
        onnx.numpy_helper.from_array(array(value), f"{name}.{of}")
        for of, value in zip(_INPUTS, (scale, offset, numbers.mean, numbers.variance), strict=True)
    ]
    node = onnx.helper.make_node(
        "BatchNormalization",
        ["x", *(tensor.name for tensor in initializers)],
        ["y"],
        name,
        epsilon=numbers.eps,
        momentum=complement(numbers.momentum),
    )
    return OnnxBatchNorm(node, initializers)


def _shortest(value: float) -> float:
    """The shortest decimal number that a float32 stands for: 1e-5, not 9.999999747378752e-06."""
    single = struct.pack("f", value)
    return next(found for digits in range(1, 10) if struct.pack("f", found := float(f"{value:.{digits}g}")) == single)


def _onnx() -> Any:
    if find_spec("onnx") is None:
        raise MissingExtraError("ONNX needs onnx: pip install 'batchnorm[export]'")
    import onnx

    return onnx
