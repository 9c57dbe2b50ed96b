"""What a forward went by, for its recomputation: by then the running statistics have moved.

A forward that may be recomputed is remembered with what it was corrected toward; the recomputation is told by its batch, which has the
same mean and M2 to the last bit. (C,) numbers are kept, of the last few forwards, as long as the buffers live.
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
from batchnorm.kernels import Renormalization
from batchnorm.moments import Moments

FORWARDS = 16  # remembered of a layer: micro-batches whose backwards are still to come


class _Forward(NamedTuple):
    batch: Moments
    renormalization: Renormalization


# Of each running mean the last forwards, the latest at the end.
_seen: MutableMapping[Tensor, deque[_Forward]] = WeakTensorKeyDictionary()


def matters() -> bool:
    """Whether the forward that runs now is a recomputation, or may have one."""
    if torch.compiler.is_compiling() or exporting() or torch.is_inference_mode_enabled() or differentiated_by_torch():
        return False
    return recomputing() or may_be_recomputed()


def remember(running_mean: Tensor, batch: Moments, renormalization: Renormalization) -> None:
    """Keep what a forward of this batch went by; `renormalization` must not move."""
    _seen.setdefault(running_mean, deque(maxlen=FORWARDS)).append(_Forward(batch, renormalization))


def known(running_mean: Tensor) -> bool:
    """Whether any forward is remembered."""
    return running_mean in _seen


def recalled(running_mean: Tensor, batch: Moments, now: Renormalization) -> Renormalization:
    """What the last forward of this batch went by, or `now` where none is remembered; no host synchronization."""
    found = now
    for forward in _seen.get(running_mean, ()):
        same = (forward.batch.mean == batch.mean).all() & (forward.batch.m2 == batch.m2).all()
        found = Renormalization(
            *(torch.where(same, *values) for values in zip(forward.renormalization, found, strict=True))
        )
    return found
