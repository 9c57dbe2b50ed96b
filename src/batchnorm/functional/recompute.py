"""Knowing that a forward is a recomputation: activation checkpointing runs it again during the backward, and it must move nothing.

Both kinds of `torch.utils.checkpoint`, and whatever else recomputes activations, do so while autograd works through a graph: in the
backward of a node (reentrant) or in the hook that unpacks a saved tensor (non-reentrant). A forward there is a recomputation. Autograd
tells by the id of its current graph task, which is -1 outside of a backward; it is one per thread, so other threads do not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from batchnorm.torch_state import graph_task, saved_tensors_hooks


class _Said(threading.local):
    active: bool | None = None


_said = _Said()


def recomputing() -> bool:
    """Whether the forward that runs now is a recomputation: it happens during a backward, or `recomputation` says so."""
    return graph_task() != -1 if _said.active is None else _said.active


def may_be_recomputed() -> bool:
    """Whether the forward that runs now looks like a checkpoint's: nothing is recorded, or hooks take what is saved."""
    return not torch.is_grad_enabled() or saved_tensors_hooks() is not None


@contextmanager
def recomputation(active: bool = True) -> Iterator[None]:
    """Say of the forwards in here whether they are recomputations, which move no running statistics.

    Needed only where the rule "a forward during a backward is a recomputation" is wrong: for code that recomputes outside of a
    backward, and, with False, for a backward that runs a forward of its own (a deep equilibrium model, say).
    """
    before, _said.active = _said.active, active
    try:
        yield
    finally:
        _said.active = before


# The same for compiled code, which may be called by a checkpoint: an operator, so that the question is asked at each call.
# It takes a tensor because an operator without inputs would be computed once and for all.
torch.library.define("batchnorm::recomputing", "(Tensor like) -> Tensor")


@torch.library.impl("batchnorm::recomputing", "CompositeExplicitAutograd")
def _recomputing(like: Tensor) -> Tensor:
    return torch.full((), recomputing(), dtype=torch.bool, device=like.device)


@torch.library.register_fake("batchnorm::recomputing")
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


def recomputing_now(like: Tensor) -> Tensor:
    """`recomputing` as a 0-d bool on the device of `like`, asked at each call of compiled code too."""
    return torch.ops.batchnorm.recomputing.default(like)
