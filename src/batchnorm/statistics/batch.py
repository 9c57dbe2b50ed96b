"""The paper's statistics: the batch's in training, the running ones in inference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from batchnorm.functional import short
from batchnorm.statistics.accumulate import accumulating
from batchnorm.statistics.contract import Layer
from batchnorm.statistics.shared import by_replicas, train_or_infer


@dataclass(frozen=True)
class Batch:
    """The paper's: batch statistics in training, running statistics in inference (Ioffe & Szegedy 2015, Algorithms 1 and 2).

    A layer without running statistics normalizes by the batch in inference as well, as torch's does.
    """

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        alone = layer.reducer is None and not accumulating()
        if alone and layer.training and layer.track_running_stats and residual is None and mask is None:
            y = _train_shortly(layer, x)
            if y is not None:
                return y
        return train_or_infer(layer, x, residual, mask, by_replicas)


def _train_shortly(layer: Layer, x: Tensor) -> Tensor | None:
    """What `Batch` makes of x in training, the short way; None where that is not the way."""
    momentum, on_nonfinite = layer.momentum, layer.on_nonfinite
    if type(momentum) is not float or on_nonfinite == "error" or not isinstance(layer, nn.Module):
        return None
    parameters, buffers = layer._parameters, layer._buffers  # found by attribute, each would cost half a microsecond
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, variance = buffers["running_mean"], buffers["running_var"]
        counters = buffers["num_batches_tracked"], buffers["num_nonfinite_batches"]
    except KeyError:  # pruned or parametrized: computed, and found by attribute alone
        return None
    if mean is None or variance is None:
        return None
    unbiased, skip_nonfinite = layer.running_variance == "unbiased", on_nonfinite != "propagate"
    running = (mean, variance, *counters, momentum, unbiased, skip_nonfinite)
    return short.take(short.TRAINING, x, weight, bias, layer.activation, layer.eps, running)
