"""Calls as exporters are to see them: torch's own operator where it computes the same, because tools look for it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels import Epilogue
from batchnorm.moments import Moments
from batchnorm.torch_state import constant_while_compiling, is_exporting

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def beyond_torch(input: Tensor, mean: Tensor | None, variance: Tensor | None, epilogue: Epilogue) -> str | None:
    """Why torch's operator does not take this call, or None. It takes dtypes all alike, or float32 beside half-precision input.

    Half-precision weight and bias beside float32 statistics, as `.half()` leaves them, become float32 in `by_torch`.
    """
    if epilogue.mask is not None:
        return "its call has a mask"
    if epilogue.sample_weights is not None:
        return "its call has sample weights"
    if input.is_complex():
        return "its input is complex"
    statistics = {value.dtype for value in (mean, variance) if value is not None}
    parameters = {value.dtype for value in (epilogue.weight, epilogue.bias) if value is not None}
    if statistics | parameters <= {input.dtype}:
        return None
    if input.dtype in (torch.float16, torch.bfloat16):
        if statistics | parameters == {torch.float32}:
            return None
        if statistics == {torch.float32} and parameters == {input.dtype}:
            return None
    return f"its input is {input.dtype}, and its parameters and running statistics are not all alike"


def by_torch(
    input: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    epilogue: Epilogue,
    training: bool = False,
    momentum: float = 0.0,
) -> Tensor:
    """`F.batch_norm`, and what follows it."""
    weight, bias = epilogue.weight, epilogue.bias
    if mean is not None and mean.dtype is torch.float32:
        weight, bias = _as_float32(weight), _as_float32(bias)
    output = F.batch_norm(input, mean, variance, weight, bias, training, momentum, eps)
    if epilogue.residual is not None:
        output = output + epilogue.residual
    return output if epilogue.activation is None else epilogue.activation(output)


def _as_float32(value: Tensor | None) -> Tensor | None:
    """The tensor itself if it is float32: exporters record a cast even of what has the dtype, and tools look for the parameter."""
    return value if value is None or value.dtype is torch.float32 else value.float()


def to_onnx() -> bool:
    """Whether this is torch.onnx's newer exporter, which makes of torch's operator in training mode one in inference."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


@constant_while_compiling  # strict export drops warnings otherwise
def warn_of_plain_operations(reason: str) -> None:
    """Say why a layer in training mode is not exported as torch's operator."""
    warnings.warn(
        "a batch norm in training mode is exported as plain operations, in which tools such as torchao's move_exported_model_to_eval "
        f"find no batch norm: {reason}; export the model after model.eval(), or use what torch's batch norm can",
        stacklevel=2,
    )


def constants(moments: Moments) -> Moments:
    """The moments without their autograd graph, in the exported program too.

    `ExportedProgram.run_decompositions` drops every `detach`, and buffers written from what is left would hold the graph of each step.
    Integers have no gradient, and nobody drops a view of the same bits. ONNX has no such view, and no buffers to write.
    """
    moments = moments.detach()
    if not is_exporting() or to_onnx():
        return moments
    count = _through_bits(moments.count) if isinstance(moments.count, Tensor) else moments.count
    return Moments(count, _through_bits(moments.mean), _through_bits(moments.m2))


def _through_bits(value: Tensor) -> Tensor:
    if value.is_complex():
        return torch.view_as_complex(_through_bits(torch.view_as_real(value)))
    return value.view(_BITS[value.element_size()]).view(value.dtype)
