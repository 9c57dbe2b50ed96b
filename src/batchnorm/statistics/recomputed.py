"""Stores the statistics that a forward used for its recomputation, because the buffers have been updated by then.

A forward that may be recomputed stores the values it used, such as copies of the buffers. The recomputation finds them by the statistics of
its batch: its mean is the same to the last bit, its deviation up to rounding. For each layer, a few (C,) tensors of the last few forwards
are stored as long as the layer exists. If batches agree in every channel, the values of the last one are used.
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

_Values = TypeVar("_Values", bound=tuple[Tensor, ...])

FORWARDS = 16  # stored for each layer: micro-batches whose backward has not run yet


class Buffers(NamedTuple):
    """The buffers of a layer before a forward updates them."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def copy(self) -> Buffers:
        return Buffers(*(value.clone() for value in self))


class _Forward(NamedTuple):
    mean: Tensor
    rstd: Tensor
    values: tuple[Tensor, ...]

    def has_batch(self, mean: Tensor, rstd: Tensor) -> Tensor:
        """Whether the batch is the same, 0-d bool. The fast and the general path may round rstd differently."""
        same_mean = torch.isclose(self.mean, mean, rtol=0.0, atol=0.0, equal_nan=True)
        return (same_mean & torch.isclose(self.rstd, rstd, rtol=1e-6, atol=0.0, equal_nan=True)).all()


# The last forwards of each layer and domain, the latest at the end.
_stored: WeakKeyDictionary[Any, dict[str | None, deque[_Forward]]] = WeakKeyDictionary()


def _forwards(layer: Layer) -> deque[_Forward]:
    owner = owner_of(layer)
    domain = None if owner is layer else getattr(layer, "domain", None)
    return _stored.setdefault(owner, {}).setdefault(domain, deque(maxlen=FORWARDS))


def is_needed() -> bool:
    """Whether the current forward is a recomputation, or may be recomputed."""
    if torch.compiler.is_compiling() or exporting() or torch.is_inference_mode_enabled() or differentiated_by_torch():
        return False
    return recomputing() or may_be_recomputed()


def store(layer: Layer, mean: Tensor, rstd: Tensor, values: tuple[Tensor, ...]) -> None:
    """Store the values that a forward of this batch used: a named tuple of copies."""
    _forwards(layer).append(_Forward(mean, rstd, values))


def look_up(layer: Layer, mean: Tensor, rstd: Tensor, default: _Values) -> _Values:
    """The values that the last forward of this batch used, or `default` if none is stored; no host synchronization."""
    found = default
    for forward in tuple(_forwards(layer)):  # other threads may add some meanwhile
        if type(forward.values) is type(default):  # if not, the layer had another source then
            same = forward.has_batch(mean, rstd)
            found = type(default)(*(torch.where(same, *pair) for pair in zip(forward.values, found, strict=True)))
    return found
