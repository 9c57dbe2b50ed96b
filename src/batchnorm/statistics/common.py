"""Shared by the statistics sources: training and inference, normalization by batch or running statistics, updates of the latter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm.errors import InputError, StateError
from batchnorm.functional import (
    Reducer,
    check_several_values,
    fast_path,
    is_single_value,
    native,
    normalize,
    normalize_with,
    recomputing,
    update_running_statistics,
)
from batchnorm.functional.autograd import exporting
from batchnorm.functional.checks import (
    check_eps,
    check_input,
    check_momentum,
    check_sum_of_weights,
    epilogue_of,
)
from batchnorm.functional.exported import beyond_torch, by_torch, to_onnx, warn_of_plain_operations
from batchnorm.kernels import Renormalization
from batchnorm.moments import Moments
from batchnorm.statistics import one_batch
from batchnorm.statistics.accumulate import accumulating, add
from batchnorm.statistics.compiled import call_compiled
from batchnorm.statistics.contract import Applying, Layer, tensors_of
from batchnorm.statistics.one_batch import in_one_batch, joint_reducer, updates_here
from batchnorm.statistics.thread import thread
from batchnorm.torch_state import differentiated_by_torch, unseen_by_checkpoints

_Normalized = Callable[["Layer", Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Moments]]


def train_or_infer(
    layer: Layer,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    normalized: _Normalized,
    size: int | None = None,
    accumulates: bool = True,
    weights: Tensor | None = None,
) -> Tensor:
    """Normalize by `normalized` in training, else by running statistics; handle single values, and update the running statistics.

    `size` is the number of samples that share statistics; None is all. `accumulates` says whether `accumulate` delays the update.
    """
    if not layer.training and layer.running_mean is not None:
        return by_running_statistics(layer, x, residual, mask)
    updates = layer.training and layer.track_running_stats
    group = x if size is None else x[:size]
    alone = reducer_of(layer) is None
    inferred = None
    if (alone or size is not None) and is_single_value(group):  # other replicas may bring more values
        if layer.on_single == "running":
            inferred = by_running_statistics(layer, x, residual, mask)
            if alone:
                return inferred
        if layer.on_single == "error":
            check_several_values(group)
        updates = updates and not alone  # the groups of other replicas update the statistics on all replicas
        if size is None:
            normalized = by_batch
    if exporting() and not to_onnx():
        y = None
        if weights is None:
            y = _by_torchs_operator(layer, x, residual, mask, normalized is by_replicas, updates)
        else:
            warn_of_plain_operations("its call has sample weights")
        if y is not None:
            return y
    y, moments = normalized(layer, x, residual, mask, weights)
    running_mean, running_var = layer.running_mean, layer.running_var
    if inferred is not None:
        y = inferred
    elif (mask is not None or weights is not None) and layer.on_single == "running" and running_mean is not None:
        several = moments.has_variance()  # over all replicas; known on the device only, so both outputs are computed
        y = torch.where(torch.as_tensor(several, device=y.device), y, by_running_statistics(layer, x, residual, mask))
    if updates and running_mean is not None and running_var is not None and updates_here():
        if weights is not None and alone and layer.on_single == "error":
            check_sum_of_weights(moments.count)
        with unseen_by_checkpoints():
            if accumulates and accumulating() and not recomputing():
                add(running_mean, moments, lambda merged: _update(layer, running_mean, running_var, merged))
            else:
                _update(layer, running_mean, running_var, moments)
    return y


def check_call(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None) -> None:
    """Check the arguments of a call in training, for a source that writes buffers before it normalizes.

    Raises:
        ArgumentError, DTypeError, InputError, ShapeError: as normalizing would, but before anything is written.
    """
    mean, variance = layer.running_mean, layer.running_var
    check_input(x, {"running_mean": mean, "running_var": variance, "weight": layer.gamma, "bias": layer.beta})
    check_eps(layer.eps)
    epilogue_of(x, layer.gamma, layer.beta, layer.activation, residual, mask, weights)
    if layer.momentum is not None:
        check_momentum(layer.momentum)


def _by_torchs_operator(
    layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, by_batch_alone: bool, updates: bool
) -> Tensor | None:
    """Call torch's operator, for exporters. If it cannot express the call, warn and return None."""
    mean, variance = (layer.running_mean, layer.running_var) if updates else (None, None)
    check_input(x, {"running_mean": mean, "running_var": variance, "weight": layer.gamma, "bias": layer.beta})
    check_eps(layer.eps)
    epilogue = epilogue_of(x, layer.gamma, layer.beta, layer.activation, residual, mask)
    momentum = layer.momentum
    reason = beyond_torch(x, mean, variance, epilogue)
    if not by_batch_alone or accumulating():
        reason = "its statistics are not those of the batch alone"
    elif reducer_of(layer) is not None:
        reason = "its statistics are those of all replicas"
    elif updates and momentum is None:
        reason = "momentum=None averages all batches"
    elif updates and layer.running_variance != "unbiased":
        reason = "its running variance is biased"
    if reason is not None:
        warn_of_plain_operations(reason)
        return None
    if updates:
        check_momentum(momentum)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
    return by_torch(x, mean, variance, layer.eps, epilogue, True, 0.0 if momentum is None else momentum)


def train_on_fast_path(
    layer: Layer,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    kind: Literal["training", "renormalization"] = "training",
    bounds: tuple[float, ...] = (),
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor | None:
    """The layer's output in training, computed by one operator, or None if the call takes the general path.

    Args:
        layer: the layer that the source received.
        x: (N, C, *S).
        residual: added before the activation; the general path takes one that is not like x.
        mask: must be None; the general path takes it.
        kind: the name of the step in `kernels.Steps`.
        bounds: further arguments of the step.
        observe: receives the batch's statistics if no gradient is recorded.
    """
    activation = layer.activation
    if isinstance(layer, Applying):
        layer = layer.owner
    if not (layer.training and layer.track_running_stats) or mask is not None:
        return None
    momentum, on_nonfinite = layer.momentum, layer.on_nonfinite
    if type(momentum) is not float or on_nonfinite == "error" or not isinstance(layer, nn.Module):
        return None
    if layer.reducer is not None or thread.window is not None:
        return None
    found = tensors_of(layer)
    if found is None:
        return None
    weight, bias, mean, variance, batches = found
    steps = fast_path.steps_for(x, mean)
    if steps is None:
        if kind != "training" or in_one_batch():
            return None
    elif thread.micro_batch is not None or one_batch.calls:  # `in_one_batch` without its frames
        return None
    skipped: Any = layer._nonfinite_batches  # the property creates it or moves it to the buffers' device
    if skipped is None or not skipped.is_cpu:
        skipped = layer.num_nonfinite_batches
    unbiased, skip_nonfinite = layer.running_variance == "unbiased", on_nonfinite != "propagate"
    if steps is None:
        buffers, update = (mean, variance, batches, skipped), (momentum, unbiased, skip_nonfinite)
        return native.train(x, weight, bias, layer.eps, activation, buffers, update, residual)
    running = (mean, variance, batches, skipped, momentum, unbiased, skip_nonfinite, *bounds, layer.eps)
    return fast_path.call(getattr(steps, kind), x, weight, bias, residual, activation, running, observe)


def by_replicas(
    layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Moments]:
    return by_batch(layer, x, residual, mask, weights, reducer_of(layer))


def by_batch(
    layer: Layer,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    weights: Tensor | None,
    reducer: Reducer | None = None,
    group_size: int | None = None,
    renormalization: Renormalization | None = None,
) -> tuple[Tensor, Moments]:
    return normalize(
        x,
        layer.gamma,
        layer.beta,
        layer.eps,
        activation=layer.activation,
        residual=residual,
        mask=mask,
        weights=weights,
        reducer=reducer,
        group_size=group_size,
        renormalization=renormalization,
    )


def reducer_of(layer: Layer) -> Reducer | None:
    """The reducer that merges the layer's statistics with other replicas or micro-batches in training; None if there are no others."""
    if not layer.training:
        return None
    reducer = layer.reducer
    return joint_reducer(layer, None if reducer is None or reducer.size == 1 else reducer)


def by_running_statistics(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    y = infer_on_fast_path(layer, x, residual, mask)
    if y is not None:
        return y
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


def infer_on_fast_path(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The layer's output by its running statistics, computed by one operator, or None if the call takes the general path."""
    if torch.compiler.is_compiling():
        return call_compiled(layer, x, residual, mask, training=False)
    activation = layer.activation
    if isinstance(layer, Applying):
        layer = layer.owner
    if mask is not None or not isinstance(layer, nn.Module):
        return None
    found = tensors_of(layer)
    if found is None:
        return None
    weight, bias, mean, variance, _ = found
    steps = fast_path.steps_for(x, mean)
    if steps is None:
        return native.infer(x, weight, bias, layer.eps, activation, (mean, variance), residual)
    return fast_path.call(steps.inference, x, weight, bias, residual, activation, (mean, variance, layer.eps))


def _update(layer: Layer, running_mean: Tensor, running_var: Tensor, moments: Moments) -> None:
    """Update the running statistics by one batch and count it, unless it is empty or not finite. Never waits for the device."""
    counter = layer.num_batches_tracked
    momentum = layer.momentum
    if momentum is None:  # the mean of all batches so far: the n-th has weight 1/n
        if counter is None:
            raise StateError("momentum=None averages over all batches and needs the counter num_batches_tracked")
        momentum = 1.0 / (counter + 1).to(moments.mean.dtype)
    raises = layer.on_nonfinite == "error" and _can_wait_for(running_mean)
    finite = update_running_statistics(
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
            'large; the running statistics are unchanged. Find the batch, or use on_nonfinite="skip" to leave such batches out'
        )


def _can_wait_for(value: Tensor) -> bool:
    return not (value.is_meta or torch.compiler.is_compiling() or differentiated_by_torch())
