"""Writing a layer's buffers from eager code, compiled code and inside `torch.func` alike."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.errors import StateError
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
