"""What a forward went by, for its recomputation: by then the buffers have moved.

A forward that may be recomputed is remembered with what it went by, such as the buffers it found; the recomputation is told by its batch,
which has the same mean to the last bit, and the same deviation. A few (C,) numbers are kept, of the last few forwards, as long as the
layer lives. Batches that are alike in every channel are told apart by nothing: the last one's are taken.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from batchnorm.functional.autograd import exporting
from batchnorm.functional.recompute import may_be_recomputed, recomputing
from batchnorm.statistics.contract import Layer, owner_of
from batchnorm.torch_state import differentiated_by_torch

_Found = TypeVar("_Found", bound=tuple[Tensor, ...])

FORWARDS = 16  # remembered of a layer: micro-batches whose backwards are still to come


class Buffers(NamedTuple):
    """What a forward finds in its layer, before it moves it."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def copy(self) -> Buffers:
        return Buffers(*(value.clone() for value in self))


class _Forward(NamedTuple):
    mean: Tensor
    rstd: Tensor
    found: tuple[Tensor, ...]

    def was_of(self, mean: Tensor, rstd: Tensor) -> Tensor:
        """Whether the batch is the same, 0-d; the way the forward went may have rounded its rstd otherwise."""
        same_mean = torch.isclose(self.mean, mean, rtol=0.0, atol=0.0, equal_nan=True)
        return (same_mean & torch.isclose(self.rstd, rstd, rtol=1e-6, atol=0.0, equal_nan=True)).all()


# Of each layer, and of each of its domains, the last forwards, the latest at the end.
_seen: WeakKeyDictionary[Any, dict[str | None, deque[_Forward]]] = WeakKeyDictionary()


def _forwards(layer: Layer) -> deque[_Forward]:
    owner = owner_of(layer)
    domain = None if owner is layer else getattr(layer, "domain", None)
    return _seen.setdefault(owner, {}).setdefault(domain, deque(maxlen=FORWARDS))


def matters() -> bool:
    """Whether the forward that runs now is a recomputation, or may have one."""
    if torch.compiler.is_compiling() or exporting() or torch.is_inference_mode_enabled() or differentiated_by_torch():
        return False
    return recomputing() or may_be_recomputed()


def remember(layer: Layer, mean: Tensor, rstd: Tensor, found: tuple[Tensor, ...]) -> None:
    """Keep what a forward of this batch went by, a named tuple of copies that do not move."""
    _forwards(layer).append(_Forward(mean, rstd, found))


def recalled(layer: Layer, mean: Tensor, rstd: Tensor, now: _Found) -> _Found:
    """What the last forward of this batch went by, or `now` where none is remembered; no host synchronization."""
    found = now
    for forward in tuple(_forwards(layer)):  # other threads may add some meanwhile
        if type(forward.found) is type(now):  # else the layer had another part then
            same = forward.was_of(mean, rstd)
            found = type(now)(*(torch.where(same, *values) for values in zip(forward.found, found, strict=True)))
    return found
