"""A layer's call in compiled code, which checks at each call every Python object that is read here: so few are (`functional.in_graph`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from batchnorm.functional import in_graph
from batchnorm.statistics.contract import Applying, Layer, tensors_of
from batchnorm.statistics.thread import thread


def train(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """y in training by torch's operator, or None if the call takes the general path."""
    owner, found = _read(layer, mask)
    if found is None or not (owner.training and owner.track_running_stats):
        return None
    momentum, on_nonfinite = owner.momentum, owner.on_nonfinite
    if type(momentum) is not float or on_nonfinite == "error":
        return None
    if owner.reducer is not None or thread.window is not None or thread.micro_batch is not None:
        return None
    skipped = owner._nonfinite_batches  # the property creates it or moves it to the buffers' device
    if skipped is None or not skipped.is_cpu:
        skipped = owner.num_nonfinite_batches
    weight, bias, *running = found
    update = (momentum, owner.running_variance == "unbiased", on_nonfinite != "propagate", owner.eps)
    return in_graph.train(x, weight, bias, (*running, skipped), update, residual, layer.activation)


def infer(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """y by running statistics, likewise."""
    owner, found = _read(layer, mask)
    if found is None:
        return None
    weight, bias, *running, _ = found
    return in_graph.infer(x, weight, bias, running, owner.eps, residual, layer.activation)


def _read(layer: Layer, mask: Tensor | None) -> tuple[Any, Any]:
    """The module that has the tensors, and those; None instead of them if torch's operators do not compute the call."""
    owner: Any = layer.owner if isinstance(layer, Applying) else layer
    return owner, tensors_of(owner) if mask is None and isinstance(owner, nn.Module) else None
