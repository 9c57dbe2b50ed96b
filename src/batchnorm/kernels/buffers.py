"""Writing a layer's buffers from eager code, compiled code and inside `torch.func` alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.errors import StateError
from batchnorm.kernels.contract import Running, Update
from batchnorm.torch_state import (
    differentiated_by_torch,
    is_batched,
    is_functional,
    only_gradient_levels,
    outside_transforms,
    tangent_level,
    tracks_gradient,
    unwrapped,
)


def update_statistics(
    running: Running, mean: Tensor, variance: Tensor, update: Update, happens: Tensor | None = None
) -> Tensor | None:
    """Update running statistics by a batch's mean and variance, (C,), where `happens` (0-d bool), and count the batch.

    Returns 0-d bool, whether they are finite in the buffers' dtypes; None without `skip_nonfinite`.
    """
    pairs = ((running.mean, mean), (running.variance, variance))
    finite = None
    if update.skip_nonfinite:
        is_finite = [value.to(buffer.dtype).isfinite() for buffer, value in pairs]
        finite = (is_finite[0] & is_finite[1]).all()
        happens = finite if happens is None else happens & finite
    if update.unless is not None:
        happens = ~update.unless if happens is None else happens & ~update.unless
    writes = []
    for buffer, value in pairs:
        old = buffer.to(value.dtype)
        new = (1 - update.momentum) * old + update.momentum * value
        writes.append((buffer, new if happens is None else torch.where(happens, new, old)))
    if running.batches is not None:
        writes.append((running.batches, running.batches + (1 if happens is None else happens)))
    for buffer, value in writes:
        check_writable(buffer, value)
    for buffer, value in writes:
        write(buffer, value)
    if running.skipped is not None and finite is not None:
        count_in(running.skipped, ~finite if update.unless is None else ~finite & ~update.unless)
    return finite


def count_in(counter: Tensor, skipped: Tensor) -> None:
    """Add 1 if the batch was skipped (0-d bool). Under `torch.vmap` the counter is one for all slices, and counts each."""
    if not differentiated_by_torch():
        counter.add_(skipped)
        return
    skipped = _without_levels(skipped)
    if not is_functional(skipped):  # `torch.func.functionalize` lets a call write its arguments alone
        with outside_transforms():
            counter.add_(skipped.sum())


def write(buffer: Tensor, value: Tensor) -> None:
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


def check_writable(buffer: Tensor, value: Tensor) -> None:
    if not differentiated_by_torch():
        return
    if is_batched(_below_gradient_levels(value)) > is_batched(_below_gradient_levels(buffer)):
        raise StateError(
            "under vmap each slice has statistics of its own, but the running statistics are shared by all slices; map over "
            "the buffers too (torch.func.stack_module_state and functional_call), freeze the layers (batchnorm.freeze), use "
            "track_running_stats=False (torch.func.replace_all_batch_norm_modules_ sets it), or call batchnorm.functional.normalize, "
            "which returns the moments"
        )


def _without_levels(value: Tensor) -> Tensor:
    while tracks_gradient(value) or is_batched(value):
        value = unwrapped(value)
    return value


def _below_gradient_levels(value: Tensor) -> Tensor:
    while tracks_gradient(value):
        value = unwrapped(value)
    return value
