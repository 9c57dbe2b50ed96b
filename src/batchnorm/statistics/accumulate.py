"""Running statistics updated once for several batches, for gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from batchnorm.errors import InputError, StateError
from batchnorm.moments import Moments
from batchnorm.statistics.thread import thread


class _Window:
    """For each running mean: the merged moments since its last update, the function that updates it, and the number of batches."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.pending: dict[int, tuple[Tensor, Moments, Callable[[Moments], None], int]] = {}

    def add(self, buffer: Tensor, moments: Moments, update: Callable[[Moments], None]) -> None:
        _, before, _, batches = self.pending.pop(id(buffer), (buffer, None, update, 0))
        merged = moments.detach() if before is None else before.merge(moments.detach())
        if batches + 1 == self.steps:
            update(merged)
        else:
            self.pending[id(buffer)] = (buffer, merged, update, batches + 1)

    def finish(self) -> None:
        pending, self.pending = self.pending, {}
        for _, moments, update, _ in pending.values():
            update(moments)


@contextmanager
def accumulate(steps: int) -> Iterator[None]:
    """Update running statistics once for every `steps` batches in this context, as if they were one batch.

    For gradient accumulation. The moments of the batches are merged exactly, so the running statistics and the count of batches are
    those of the big batch. Each batch is still normalized by its own statistics, since those of the big batch are not known before its
    last micro-batch. So outputs and gradients are those of the small batches; `as_one_batch` gives those of the big one, and `Renorm`
    helps small ones. The context holds for the current thread; each layer counts its own batches. At the end, remaining batches update
    the statistics too, unless an error ends the context. A batch that is not finite makes its whole window not finite. `MovingAverage`
    averages over batches anyway and ignores the context. If activations are checkpointed, run the backward in the context.

    Raises:
        InputError: if steps is less than 1.
        StateError: from a layer in compiled code, which cannot store moments between calls.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, the number of batches that count as one, but got {steps}")
    before, thread.window = thread.window, _Window(steps)
    try:
        yield
        thread.window.finish()
    finally:
        thread.window = before


def accumulating() -> bool:
    """Whether an `accumulate` context is active."""
    if thread.window is None:
        return False
    if torch.compiler.is_compiling():
        raise StateError(
            "accumulate stores moments between calls, which compiled code cannot; call the model uncompiled under accumulate"
        )
    return True


def add(buffer: Tensor, moments: Moments, update: Callable[[Moments], None]) -> None:
    """Merge the moments into the window of a buffer; when the window is full, update the buffer."""
    assert thread.window is not None
    thread.window.add(buffer, moments, update)
