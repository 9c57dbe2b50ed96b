"""Torch's batch normalization, with all that a layer adds to it, as operators that compilers take apart.

At each call compiled code checks every Python object that was read while it was traced, which takes as long as a small layer. What an
operator reads is not among them. A compiler sees these as one call, then as the operations that they consist of, and fuses those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.functional.checks import is_like
from batchnorm.functional.recompute import ANYWHERE
from batchnorm.kernels import Activation, Running, Update, buffers
from batchnorm.version import __version__

# `version` makes the graphs of two releases differ: a compiler caches what it made of one by its operators and arguments.
_EPILOGUE = "Tensor? residual, str? activation, float slope, str version"

torch.library.define(
    "batchnorm::train_in_graph",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? batches, "
    f"Tensor(d!)? skipped, Tensor anywhere, float momentum, bool unbiased, bool skip_nonfinite, float eps, {_EPILOGUE}) -> Tensor",
)
torch.library.define(
    "batchnorm::infer_in_graph",
    f"(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, {_EPILOGUE}) -> Tensor",
)


@torch.library.impl("batchnorm::train_in_graph", "CompositeImplicitAutograd")
def _train(x: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments: Any) -> Tensor:
    """The statistics of the batch are computed by torch's operator, as in `kernels.aten`; the running ones are updated by them."""
    *running, anywhere, momentum, unbiased, skip_nonfinite, eps, residual, activation, slope, _ = arguments
    count = x.numel() // x.shape[1]
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean, variance = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device).unbind()
    y = torch.batch_norm(x, weight, bias, mean, variance, True, 1.0, eps, torch.backends.cudnn.enabled)
    update = Update(momentum, unbiased, skip_nonfinite, torch.ops.batchnorm.recomputing.default(anywhere))
    with torch.no_grad():
        variance = variance if unbiased else variance * ((count - 1) / count)
        buffers.update_statistics(Running(*running), mean, variance, update)
    return _finished(y, residual, activation, slope)


@torch.library.impl("batchnorm::infer_in_graph", "CompositeImplicitAutograd")
def _infer(x: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments: Any) -> Tensor:
    mean, variance, eps, residual, activation, slope, _ = arguments
    enabled = torch.backends.cudnn.enabled
    y = torch.batch_norm(x, weight, bias, mean.detach(), variance.detach(), False, 0.0, eps, enabled)
    return _finished(y, residual, activation, slope)


def _finished(y: Tensor, residual: Tensor | None, activation: str | None, slope: float) -> Tensor:
    z = y if residual is None else y + residual
    return z if activation is None else Activation(activation, slope)(z)


_TRAIN, _INFER = torch.ops.batchnorm.train_in_graph.default, torch.ops.batchnorm.infer_in_graph.default


def accepts(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, residual: Tensor | None
) -> bool:
    """Whether the operators accept these tensors. Beside half-precision input torch computes in the parameters' dtype, so half-precision
    parameters would round the statistics.
    """
    if type(x) is not Tensor or x.dim() < 2 or not x.is_floating_point() or x.itemsize < 2 or x.numel() == 0:
        return False
    dtype, C = torch.float64 if x.dtype is torch.float64 else torch.float32, x.shape[1]
    for values in (weight, bias):
        if values is not None and (values.dim() != 1 or values.shape[0] != C or values.dtype is not dtype):
            return False
    for values in (mean, variance):
        if values.dim() != 1 or values.shape[0] != C or values.is_complex():
            return False
    return residual is None or is_like(residual, x)


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Any, ...],
    update: tuple[Any, ...],
    residual: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    """y in training, in compiled code.

    Args:
        x: (N, C, *S), as are the tensors that `accepts` has accepted.
        weight: gamma, (C,).
        bias: beta, (C,).
        running: the fields of `Running`.
        update: the first three fields of `Update`, and eps.
        residual: added before the activation.
        activation: applied last.
    """
    name, slope = (None, 0.0) if activation is None else (activation.name, activation.negative_slope)
    return _TRAIN(
        x, weight, bias, *running, ANYWHERE if x.is_cpu else running[0], *update, residual, name, slope, __version__
    )


def infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor],
    eps: float,
    residual: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    """y by running statistics, in compiled code."""
    name, slope = (None, 0.0) if activation is None else (activation.name, activation.negative_slope)
    return _INFER(x, weight, bias, *running, eps, residual, name, slope, __version__)
