"""Detects recomputations: activation checkpointing runs a forward again in the backward, where it must not update statistics again.

Both kinds of `torch.utils.checkpoint`, and other code that recomputes activations, run the forward while autograd executes a graph: in
the backward of a node (reentrant) or in the hook that unpacks a saved tensor (non-reentrant). Outside of a backward, the id of autograd's
current graph task is -1. The id is thread-local, so other threads do not matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from batchnorm.kernels import cpu
from batchnorm.torch_state import (
    checked_by_compiled_code,
    constant_while_compiling,
    graph_task,
    never_stored_by_checkpoints,
    saved_tensors_hooks,
)


class _Said(threading.local):
    active: bool | None = None


_said = _Said()


def recomputing() -> bool:
    """Whether the forward that runs now is a recomputation: it happens during a backward, or `recomputation` says so."""
    return graph_task() != -1 if _said.active is None else _said.active


def may_be_recomputed() -> bool:
    """Whether a checkpoint may run the current forward again: gradients are off, or hooks intercept saved tensors."""
    return not torch.is_grad_enabled() or saved_tensors_hooks() is not None


@contextmanager
def recomputation(active: bool = True) -> Iterator[None]:
    """Declare whether the forwards in this context are recomputations, which do not update running statistics.

    You need it only if the rule "a forward during a backward is a recomputation" is wrong: for code that recomputes outside of a
    backward and, with False, for a backward that runs a new forward, as that of a deep equilibrium model does.
    """
    before = _said.active
    _say(active)
    try:
        yield
    finally:
        _say(before)


def _say(active: bool | None) -> None:
    _said.active = active
    cpu.say_recomputation(active)


@constant_while_compiling
def recomputing_while_compiled() -> bool | None:
    """`recomputing`, as a constant that the code which is compiled now checks before each call; None if it has to ask by the operator.

    If it changes, the code is compiled again. A checkpoint that intercepts saved tensors calls the same code for the forward and for the
    recomputation, and there it would be compiled twice.
    """
    if saved_tensors_hooks() is not None or not checked_by_compiled_code(recomputing):
        return None
    return recomputing()


# The same as an operator, evaluated at each call of compiled code. It takes a tensor because compilers evaluate an operator without inputs
# only once. For tensors on the CPU the C++ library has it, csrc/torch/recompute.h: a call of Python takes as long as the normalization of
# a small tensor.
torch.library.define("batchnorm::recomputing", "(Tensor like) -> Tensor")


def _recomputing(like: Tensor) -> Tensor:
    return torch.full((), recomputing(), dtype=torch.bool, device=like.device)


torch.library.impl("batchnorm::recomputing", "CompositeExplicitAutograd", _recomputing)
never_stored_by_checkpoints(torch.ops.batchnorm.recomputing.default)


@torch.library.register_fake("batchnorm::recomputing")
def _(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.bool)


_ON_CPU = torch.zeros(())  # no slice of `torch.vmap`, to which the operator would be applied one by one


def recomputing_now(like: Tensor) -> Tensor:
    """`recomputing` as a 0-d bool on the device of `like`, right at each call of compiled code too."""
    return as_tensor(recomputing_while_compiled(), _ON_CPU if like.is_cpu else like)


def as_tensor(again: bool | None, like: Tensor) -> Tensor:
    """What `recomputing_while_compiled` returned as a 0-d bool on the device of `like`.

    Also if it is a constant, so that the code of a forward and that of its recomputation save the same tensors for the backward.
    """
    if again is None:
        return torch.ops.batchnorm.recomputing.default(like)
    return torch.full((), again, dtype=torch.bool, device=like.device)
