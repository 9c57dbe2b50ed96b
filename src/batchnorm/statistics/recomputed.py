"""What a forward went by, for its recomputation: by then the buffers have moved.

A forward that may be recomputed is remembered with the buffers it found; the recomputation is told by its batch, which has the same mean
to the last bit. A few (C,) numbers are kept, of the last few forwards, as long as the buffers live.
"""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.functional.autograd import differentiated_by_torch, exporting
from batchnorm.functional.recompute import may_be_recomputed, recomputing

FORWARDS = 16  # remembered of a layer: micro-batches whose backwards are still to come


class Buffers(NamedTuple):
    """What a forward finds in its layer, before it moves it."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def copy(self) -> Buffers:
        return Buffers(*(value.clone() for value in self))


class _Forward(NamedTuple):
    batch_mean: Tensor
    found: Buffers


# Of each running mean the last forwards, the latest at the end.
_seen: MutableMapping[Tensor, deque[_Forward]] = WeakTensorKeyDictionary()


def matters() -> bool:
    """Whether the forward that runs now is a recomputation, or may have one."""
    if torch.compiler.is_compiling() or exporting() or torch.is_inference_mode_enabled() or differentiated_by_torch():
        return False
    return recomputing() or may_be_recomputed()


def remember(running_mean: Tensor, batch_mean: Tensor, found: Buffers) -> None:
    """Keep what a forward of this batch found, as a copy that does not move."""
    _seen.setdefault(running_mean, deque(maxlen=FORWARDS)).append(_Forward(batch_mean, found))


def known(running_mean: Tensor) -> bool:
    """Whether any forward is remembered."""
    return running_mean in _seen


def recalled(batch_mean: Tensor, now: Buffers) -> Buffers:
    """What the last forward of this batch found, or `now` where none is remembered; no host synchronization."""
    buffers = now
    for forward in _seen.get(now.running_mean, ()):
        same = (forward.batch_mean == batch_mean).all()
        buffers = Buffers(*(torch.where(same, *values) for values in zip(forward.found, buffers, strict=True)))
    return buffers
