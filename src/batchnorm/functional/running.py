"""Running statistics: one step of the moving averages, from eager code, compiled code and torch.func alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.errors import StateError
from batchnorm.functional.autograd import exporting
from batchnorm.functional.checks import check_momentum, check_widths
from batchnorm.functional.parts import parts_of_buffer
from batchnorm.functional.recompute import recomputing, recomputing_now
from batchnorm.kernels import cpu
from batchnorm.moments import Moments
from batchnorm.torch_state import (
    differentiated_by_torch,
    is_batched,
    is_functional,
    only_gradient_levels,
    outside_transforms,
    static_address,
    tangent_level,
    tracks_gradient,
    unwrapped,
)


def move_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | Tensor = 0.1,
    *,
    unbiased: bool = True,
    skip_nonfinite: bool = False,
    counters: cpu.Counters = (None, None),
) -> Tensor | None:
    """One step of the moving averages, in place: running = (1 - momentum) · running + momentum · batch.

    Computed in the moments' dtype and rounded once. Where a mask leaves fewer than two values, or the batch is empty, nothing
    moves: there is no variance to learn from. In a recomputation (`recompute.recomputing`) nothing moves either: the step was taken
    when the forward ran for the first time. No host synchronization.

    Args:
        running_mean: (C,), any floating dtype.
        running_var: (C,), any floating dtype.
        moments: of the batch.
        momentum: the weight of the batch; a number or a 0-d tensor.
        unbiased: follow the unbiased variance (torch, and the paper's section 3.1) or the biased one (Keras, Flax).
        skip_nonfinite: let a batch pass by whose statistics are not finite in the buffers' dtype, whole or not at all.
        counters: 0-d int64 tensors that count the batches that moved the statistics, and those that were skipped.

    Returns:
        0-d bool, whether the statistics were finite; None if that was not asked for.

    Raises:
        ArgumentError, ShapeError: on a momentum that is no number, on buffers of another number of channels; nothing is written.
        StateError: under `torch.vmap`, if the batch statistics differ from slice to slice and the buffers do not.
    """
    count = moments.count
    if (isinstance(count, int) and count == 0) or (not torch.compiler.is_compiling() and recomputing()):
        return None
    check_momentum(momentum)
    check_widths({"running_mean": running_mean, "running_var": running_var}, moments.mean.shape[0])
    if running_mean.is_complex() or moments.mean.is_complex():
        running_mean, running_var = parts_of_buffer(running_mean), parts_of_buffer(running_var)
        moments = Moments(count, parts_of_buffer(moments.mean), parts_of_buffer(moments.m2))
    if (
        isinstance(momentum, float)
        and cpu.moves(running_mean, running_var, moments, counters)
        and not differentiated_by_torch()
        and not exporting()  # a trace counts values by tensors
    ):
        finite = cpu.update_running(running_mean, running_var, moments, momentum, unbiased, skip_nonfinite, counters)
        return finite if skip_nonfinite else None
    return _move_by_torch(running_mean, running_var, moments, momentum, unbiased, skip_nonfinite, counters)


@torch.no_grad()
def _move_by_torch(
    running_mean: Tensor,
    running_var: Tensor,
    moments: Moments,
    momentum: float | Tensor,
    unbiased: bool,
    skip_nonfinite: bool,
    counters: cpu.Counters,
) -> Tensor | None:
    count = moments.count
    pairs = ((running_mean, moments.mean), (running_var, moments.variance(unbiased=unbiased)))
    finite = first = None
    moves = None if isinstance(count, int) else count > 1
    if skip_nonfinite:
        finite = torch.stack([value.to(running.dtype).isfinite().all() for running, value in pairs]).all()
        moves = finite if moves is None else moves & finite
    if torch.compiler.is_compiling() and not exporting():  # whether this is a recomputation shows when the code runs
        first = ~recomputing_now(moments.mean)
        moves = first if moves is None else moves & first
    steps = []
    for running, value in pairs:
        old = running.to(value.dtype)
        step = (1 - momentum) * old + momentum * value
        steps.append((running, step if moves is None else torch.where(moves, step, old)))
    moved, skipped = counters
    if moved is not None:
        steps.append((moved, moved + (1 if moves is None else moves)))
    for buffer, value in steps:
        _check_writable(buffer, value)
    for buffer, value in steps:
        _write(buffer, value)
    if skipped is not None and finite is not None and not exporting():  # exported programs write buffers alone
        _count(skipped, ~finite if first is None else ~finite & first)
    return finite


def counter_on(device: torch.device, before: Tensor | None = None) -> Tensor:
    """A counter of skipped batches, 0-d int64, with the value it had before; 0 if that is None or has none (meta device)."""
    if before is not None and before.device == device:
        return before
    if torch.compiler.is_compiling():
        return torch.zeros((), dtype=torch.int64, device=device)
    with outside_transforms(), torch.inference_mode(False):
        if before is not None and not before.is_meta and device.type != "meta":
            return before.to(device)
        counter = torch.zeros((), dtype=torch.int64, device=device)
    static_address(counter)
    return counter


def _count(counter: Tensor, skipped: Tensor) -> None:
    """Add 1 if the batch was skipped (0-d bool). Under `torch.vmap` the counter is one for all slices, and counts each."""
    if not differentiated_by_torch():
        counter.add_(skipped)
        return
    skipped = _without_levels(skipped)
    if not is_functional(skipped):  # `torch.func.functionalize` lets a call write its arguments alone
        with outside_transforms():
            counter.add_(skipped.sum())


def _write(buffer: Tensor, value: Tensor) -> None:
    """`buffer.copy_(value)` of a buffer found writable, also from inside `torch.func.grad`.

    That refuses to write to a tensor it did not get as an argument. A buffer holds values, never gradients: what is written is
    what lies below the gradient levels.
    """
    if tangent_level() >= 0:
        value = forward_ad.unpack_dual(value).primal
    if not differentiated_by_torch() or not only_gradient_levels():
        buffer.copy_(value)
        return
    with outside_transforms():
        _below_gradient_levels(buffer).copy_(_below_gradient_levels(value))


def _check_writable(buffer: Tensor, value: Tensor) -> None:
    if not differentiated_by_torch():
        return
    if is_batched(_below_gradient_levels(value)) > is_batched(_below_gradient_levels(buffer)):
        raise StateError(
            "under vmap each slice has statistics of its own, but the running statistics are shared by all slices; map over "
            "the buffers too (torch.func.stack_module_state and functional_call), use track_running_stats=False, or "
            "call batchnorm.functional.normalize, which returns the moments"
        )


def _without_levels(value: Tensor) -> Tensor:
    while tracks_gradient(value) or is_batched(value):
        value = unwrapped(value)
    return value


def _below_gradient_levels(value: Tensor) -> Tensor:
    while tracks_gradient(value):
        value = unwrapped(value)
    return value
