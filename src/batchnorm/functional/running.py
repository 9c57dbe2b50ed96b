"""Running statistics: one update of the moving averages, and the counter of skipped batches."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.functional.autograd import exporting
from batchnorm.functional.checks import check_momentum, check_widths
from batchnorm.functional.components import components_of_buffer
from batchnorm.functional.recompute import recomputing, recomputing_now
from batchnorm.kernels import Running, Update, select_update
from batchnorm.moments import Moments
from batchnorm.torch_state import outside_transforms, static_address, unseen_by_checkpoints


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | Tensor = 0.1,
    *,
    unbiased: bool = True,
    skip_nonfinite: bool = False,
    counters: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor | None:
    """Update running statistics in place: running = (1 - momentum) · running + momentum · batch.

    Computed in the moments' dtype and rounded once. An empty batch, or one value per channel under a mask, updates nothing: it has no
    variance to learn from. A recomputation (`recompute.recomputing`) updates nothing either, because the forward did when it ran
    first. Never waits for the device.

    Args:
        running_mean: (C,), any floating dtype.
        running_var: (C,), any floating dtype.
        moments: of the batch.
        momentum: the weight of the batch; a number or a 0-d tensor.
        unbiased: use the unbiased variance (torch, and the paper's section 3.1) or the biased one (Keras, Flax).
        skip_nonfinite: update neither buffer if the batch's statistics are not finite in the buffers' dtype.
        counters: 0-d int64 tensors that count the batches that updated the statistics, and those that were skipped.

    Returns:
        0-d bool, whether the statistics were finite; None without skip_nonfinite.

    Raises:
        ArgumentError, ShapeError: on a momentum that is no number, on buffers of another number of channels; nothing is written.
        StateError: under `torch.vmap`, if the batch statistics differ from slice to slice and the buffers do not.
    """
    count = moments.count
    if (isinstance(count, int) and count == 0) or (not torch.compiler.is_compiling() and recomputing()):
        return None
    check_momentum(momentum)
    check_widths({"running_mean": running_mean, "running_var": running_var}, moments.mean.shape[0])
    with unseen_by_checkpoints():
        if running_mean.is_complex() or moments.mean.is_complex():
            running_mean, running_var = components_of_buffer(running_mean), components_of_buffer(running_var)
            moments = Moments(count, components_of_buffer(moments.mean), components_of_buffer(moments.m2))
        batches, skipped = counters
        unless = None
        if exporting():
            skipped = None  # exported programs write buffers alone
        elif torch.compiler.is_compiling():  # whether this is a recomputation shows when the code runs
            unless = recomputing_now(moments.mean)
        running = Running(running_mean, running_var, batches, skipped)
        update = Update(momentum, unbiased, skip_nonfinite, unless)
        return select_update(running, moments, update).update_running(running, moments, update)


def counter_on(device: torch.device, before: Tensor | None = None) -> Tensor:
    """A counter of skipped batches, 0-d int64, with the value it had before; 0 if that is None or has none (meta device)."""
    if before is not None and before.device == device:
        return before
    if torch.compiler.is_compiling():
        return torch.zeros((), dtype=torch.int64, device=device)
    with outside_transforms(), torch.inference_mode(False), unseen_by_checkpoints():
        if before is not None and not before.is_meta and device.type != "meta":
            return before.to(device)
        counter = torch.zeros((), dtype=torch.int64, device=device)
    static_address(counter)
    return counter
