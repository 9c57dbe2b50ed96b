"""A layer's call in compiled code, which checks at each call every Python object that is read here: so few are (`functional.in_graph`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.functional import in_graph
from batchnorm.statistics.contract import Applying, Layer, tensors_of
from batchnorm.statistics.thread import thread
from batchnorm.torch_state import differentiated_by_torch, is_exporting


def train(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """y in training by torch's operator, or None if the call takes the general path."""
    activation = layer.activation
    owner: Any = layer.owner if isinstance(layer, Applying) else layer
    found = _accepted(owner, x, residual, mask)
    if found is None or not (owner.training and owner.track_running_stats):
        return None
    momentum, on_nonfinite, eps = owner.momentum, owner.on_nonfinite, owner.eps
    if type(momentum) is not float or on_nonfinite == "error" or not eps > 0.0 or x.numel() < 2 * x.shape[1]:
        return None
    if owner.reducer is not None or thread.window is not None or thread.micro_batch is not None:
        return None
    skipped = owner._nonfinite_batches  # the property creates it or moves it to the buffers' device
    if skipped is None or not skipped.is_cpu:
        skipped = owner.num_nonfinite_batches
    weight, bias, *running = found
    update = (momentum, owner.running_variance == "unbiased", on_nonfinite != "propagate", eps)
    return in_graph.train(x, weight, bias, (*running, skipped), update, residual, activation)


def infer(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """y by running statistics, likewise."""
    activation = layer.activation
    owner: Any = layer.owner if isinstance(layer, Applying) else layer
    found = _accepted(owner, x, residual, mask)
    if found is None:
        return None
    weight, bias, mean, variance, _ = found
    if mean.dtype is not variance.dtype or mean.dtype not in (x.dtype, torch.float32) or not owner.eps >= 0.0:
        return None
    return in_graph.infer(x, weight, bias, (mean, variance), owner.eps, residual, activation)


def _accepted(
    owner: Any, x: Tensor, residual: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None] | None:
    """Weight, bias, running mean, running variance and counter; None if torch's operators do not compute the call."""
    if not isinstance(owner, nn.Module) or mask is not None or is_exporting() or differentiated_by_torch():
        return None
    found = tensors_of(owner)
    return found if found is not None and in_graph.accepts(x, *found[:4], residual) else None
