"""A layer's call in compiled code, which checks at each call every Python object that is read here: so few are (`functional.in_graph`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from batchnorm.functional.in_graph import infer as infer_in_graph
from batchnorm.functional.in_graph import train as train_in_graph
from batchnorm.kernels import Activation
from batchnorm.statistics.contract import Applying, Layer
from batchnorm.statistics.thread import thread


def train_compiled(layer: Any, activation: Activation | None, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """y in training by torch's operator, or None if the call takes the general path. `layer` is a module, and so has the tensors."""
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None or not (layer.training and layer.track_running_stats):
        return None
    momentum, on_nonfinite = layer.momentum, layer.on_nonfinite
    if not isinstance(momentum, float) or on_nonfinite == "error":
        return None
    if layer.reducer is not None or thread.window is not None:  # micro-batches of `as_one_batch` run uncompiled
        return None
    skipped = layer._nonfinite_batches  # the property creates it or moves it to the buffers' device
    if skipped is None or not skipped.is_cpu:
        skipped = layer.num_nonfinite_batches
    running = (mean, variance, layer.num_batches_tracked, skipped)
    update = (momentum, layer.running_variance == "unbiased", on_nonfinite != "propagate", layer.eps)
    return train_in_graph(x, layer.weight, layer.bias, running, update, residual, activation)


def call_compiled(
    layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, *, training: bool
) -> Tensor | None:
    """The same for what a source received, the layer or a stand-in for it; or y by running statistics."""
    owner = layer.owner if isinstance(layer, Applying) else layer
    if mask is not None or not isinstance(owner, nn.Module):
        return None
    module: Any = owner
    if training:
        return train_compiled(module, layer.activation, x, residual)
    running = module.running_mean, module.running_var
    return infer_in_graph(x, module.weight, module.bias, running, module.eps, residual, layer.activation)
