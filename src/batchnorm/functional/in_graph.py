"""Torch's batch normalization, with all that a layer adds to it, as operators that compilers take apart.

At each call compiled code checks every Python object that was read while it was traced, which takes as long as a small layer. What an
operator reads is not among them. A compiler sees these as one call, then as the operations that they consist of, and fuses those.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from batchnorm.functional.native import WIDE, accepts, train_and_update
from batchnorm.functional.recompute import as_tensor, recomputing_while_compiled
from batchnorm.kernels import Activation, Running, Update
from batchnorm.torch_state import takes_plain_operations
from batchnorm.version import __version__

# It makes the graphs of two releases differ: a compiler caches what it made of one by its operators and arguments.
_OVERLOAD = "v" + re.sub(r"\W", "_", __version__)

_EPILOGUE = "Tensor? residual, str? activation, float slope"

torch.library.define(
    f"batchnorm::train_in_graph.{_OVERLOAD}",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? batches, "
    f"Tensor(d!)? skipped, float momentum, bool unbiased, bool skip_nonfinite, float eps, {_EPILOGUE}, bool? again) -> Tensor",
)
torch.library.define(
    f"batchnorm::infer_in_graph.{_OVERLOAD}",
    f"(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, {_EPILOGUE}) -> Tensor",
)


@torch.library.impl(f"batchnorm::train_in_graph.{_OVERLOAD}", "CompositeImplicitAutograd")
def _train(x: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments: Any) -> Tensor:
    *running, momentum, unbiased, skip_nonfinite, eps, residual, activation, slope, again = arguments
    unless = as_tensor(again, running[0])  # a tensor beside the arguments would be checked at each call
    update = Update(momentum, unbiased, skip_nonfinite, unless)
    # Two tensors: halves of one would be selected at each use.
    zeros = [x.new_zeros(x.shape[1], dtype=WIDE[x.dtype]) for _ in range(2)]
    y = train_and_update(x, weight, bias, eps, zeros, Running(*running), update)
    return _finished(y, residual, activation, slope)


@torch.library.impl(f"batchnorm::infer_in_graph.{_OVERLOAD}", "CompositeImplicitAutograd")
def _infer(x: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments: Any) -> Tensor:
    mean, variance, eps, residual, activation, slope = arguments
    enabled = torch.backends.cudnn.enabled
    y = torch.batch_norm(x, weight, bias, mean.detach(), variance.detach(), False, 0.0, eps, enabled)
    return _finished(y, residual, activation, slope)


def _finished(y: Tensor, residual: Tensor | None, activation: str | None, slope: float) -> Tensor:
    z = y if residual is None else y + residual
    return z if activation is None else Activation(activation, slope)(z)


_TRAIN: Any = getattr(torch.ops.batchnorm.train_in_graph, _OVERLOAD)
_INFER: Any = getattr(torch.ops.batchnorm.infer_in_graph, _OVERLOAD)


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Any, ...],
    update: tuple[Any, ...],
    residual: Tensor | None,
    activation: Activation | None,
) -> Tensor | None:
    """y in training, in compiled code, or None if the call takes the general path.

    Args:
        x: (N, C, *S).
        weight: gamma, (C,).
        bias: beta, (C,).
        running: the fields of `Running`.
        update: the first three fields of `Update`, and eps.
        residual: added before the activation.
        activation: applied last.
    """
    *_, eps = update
    if takes_plain_operations() or not accepts(x, weight, bias, running[0], running[1], residual):
        return None
    if not eps > 0.0 or x.numel() < 2 * x.shape[1]:
        return None
    name, slope = (None, 0.0) if activation is None else (activation.name, activation.negative_slope)
    return _TRAIN(x, weight, bias, *running, *update, residual, name, slope, recomputing_while_compiled())


def infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    eps: float,
    residual: Tensor | None,
    activation: Activation | None,
) -> Tensor | None:
    """y by running statistics, likewise."""
    mean, variance = running
    if mean is None or variance is None:
        return None
    if takes_plain_operations() or not accepts(x, weight, bias, mean, variance, residual) or not eps >= 0.0:
        return None
    if mean.dtype is not variance.dtype or not (
        mean.dtype is x.dtype or (mean.is_floating_point() and mean.itemsize == 4)
    ):
        return None
    name, slope = (None, 0.0) if activation is None else (activation.name, activation.negative_slope)
    return _INFER(x, weight, bias, mean, variance, eps, residual, name, slope)
