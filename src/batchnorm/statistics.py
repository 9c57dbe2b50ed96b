"""Where the normalizing statistics come from, as parts a layer is given: `BatchNorm2d(64, statistics=Running())`.

A part is stateless: what it remembers lives in the layer's buffers, so that every layer has the state_dict of torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.errors import InputError, StateError
from batchnorm.functional import (
    check_several_values,
    is_single_value,
    move_running_statistics,
    normalize,
    normalize_with,
)
from batchnorm.functional.autograd import differentiated_by_torch
from batchnorm.functional.short import training_step
from batchnorm.kernels import Activation
from batchnorm.moments import Moments


class Layer(Protocol):
    """What a part sees of the layer it serves; the names are those of `torch.nn.BatchNorm2d` and of `layers.BatchNorm`."""

    training: bool
    eps: float
    momentum: float | None
    track_running_stats: bool
    activation: Activation | None
    running_variance: str
    on_single: str
    on_nonfinite: str
    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, Tensor | None]

    @property
    def gamma(self) -> Tensor | None: ...
    @property
    def beta(self) -> Tensor | None: ...

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    num_nonfinite_batches: Tensor | None


class Statistics(Protocol):
    """A source of statistics: normalizes x (N, C, *S) for a layer, and moves the layer's buffers if that is its way."""

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """The layer's output for x, of x's shape and dtype."""
        ...


@dataclass(frozen=True)
class Batch:
    """The paper's: batch statistics in training, running statistics in inference (Ioffe & Szegedy 2015, Algorithms 1 and 2).

    A layer without running statistics normalizes by the batch in inference as well, as torch's does.
    """

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        if not layer.training and layer.running_mean is not None:
            return _by_running_statistics(layer, x, residual, mask)
        moves = layer.training and layer.track_running_stats
        if moves and residual is None and mask is None:
            y = _in_one_step(layer, x)
            if y is not None:
                return y
        if is_single_value(x):
            if layer.on_single == "running":
                return _by_running_statistics(layer, x, residual, mask)
            if layer.on_single == "error":
                check_several_values(x)
            moves = False
        y, moments = normalize(
            x, layer.gamma, layer.beta, layer.eps, activation=layer.activation, residual=residual, mask=mask
        )
        if moves and layer.running_mean is not None and layer.running_var is not None:
            _move(layer, layer.running_mean, layer.running_var, moments)
        return y


@dataclass(frozen=True)
class Running:
    """The running statistics, in training too: a frozen layer. Its affine parameters still learn, its buffers never move."""

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        return _by_running_statistics(layer, x, residual, mask)


def _by_running_statistics(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    if layer.running_mean is None or layer.running_var is None:
        raise StateError(
            "normalizing by running statistics needs them, but this layer has none; build it with track_running_stats=True"
        )
    return normalize_with(
        x,
        layer.running_mean,
        layer.running_var,
        layer.gamma,
        layer.beta,
        layer.eps,
        activation=layer.activation,
        residual=residual,
        mask=mask,
    )


def _in_one_step(layer: Layer, x: Tensor) -> Tensor | None:
    """What `Batch` makes of x in training, the short way; None where that is not the way."""
    momentum, on_nonfinite = layer.momentum, layer.on_nonfinite
    if type(momentum) is not float or on_nonfinite == "error":
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
    running = (mean, variance, *counters)
    return training_step(x, weight, bias, running, momentum, unbiased, skip_nonfinite, layer.eps, layer.activation)


def _move(layer: Layer, running_mean: Tensor, running_var: Tensor, moments: Moments) -> None:
    """Move the running statistics by one batch and count it, unless it is empty or not finite; no host synchronization."""
    counter = layer.num_batches_tracked
    momentum = layer.momentum
    if momentum is None:  # the mean of all batches so far: the n-th weighs 1/n
        if counter is None:
            raise StateError("momentum=None averages over all batches and needs the counter num_batches_tracked")
        momentum = 1.0 / (counter + 1).to(moments.mean.dtype)
    raises = layer.on_nonfinite == "error" and _can_wait_for(running_mean)
    finite = move_running_statistics(
        running_mean,
        running_var,
        moments,
        momentum,
        unbiased=layer.running_variance == "unbiased",
        skip_nonfinite=layer.on_nonfinite != "propagate",
        counters=(counter, None if raises else layer.num_nonfinite_batches),
    )
    if raises and finite is not None and not finite:
        raise InputError(
            f"the statistics of a batch must be finite in {running_mean.dtype}, but its input holds NaN or Inf, or values too "
            'large; the running statistics did not move. Find the batch, or use on_nonfinite="skip" to pass over it'
        )


def _can_wait_for(value: Tensor) -> bool:
    return not (value.is_meta or torch.compiler.is_compiling() or differentiated_by_torch())
