"""Running statistics over several batches at once, for gradients that are accumulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from batchnorm.errors import InputError, StateError
from batchnorm.moments import Moments
from batchnorm.statistics.thread import thread


class _Window:
    """What the layers have seen since they moved last, by the buffer that will move; what moves it; and how many batches it was."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.pending: dict[int, tuple[Tensor, Moments, Callable[[Moments], None], int]] = {}

    def add(self, buffer: Tensor, moments: Moments, move: Callable[[Moments], None]) -> None:
        _, before, _, batches = self.pending.pop(id(buffer), (buffer, None, move, 0))
        merged = moments.detach() if before is None else before.merge(moments.detach())
        if batches + 1 == self.steps:
            move(merged)
        else:
            self.pending[id(buffer)] = (buffer, merged, move, batches + 1)

    def finish(self) -> None:
        pending, self.pending = self.pending, {}
        for _, moments, move, _ in pending.values():
            move(moments)


@contextmanager
def accumulate(steps: int) -> Iterator[None]:
    """Running statistics move once for every `steps` batches in here, as of one batch that holds them all.

    For gradient accumulation. The moments of the batches merge exactly, so the running statistics, and the count of batches, are those
    of the big batch. What each batch is normalized by stays its own: statistics of the big batch are not known before its last part
    was seen. So outputs and gradients are those of the small batches; those of the big batch are `as_one_batch`'s, and a part such as
    `Renorm` makes the best of small ones. One thread's own; each layer counts its own batches; what is left over at the end
    moves the statistics too, and is dropped if an error ends the context. A batch that is not finite makes its whole window so. Layers
    with `MovingAverage`, which averages over batches anyway, do not mind it.

    Raises:
        InputError: if steps is less than 1.
        StateError: from a layer in compiled code, which cannot keep moments between calls.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, the batches that count as one, but got {steps}")
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
            "accumulated statistics are kept between calls, which compiled code cannot; call the model uncompiled under accumulate"
        )
    return True


def add(buffer: Tensor, moments: Moments, move: Callable[[Moments], None]) -> None:
    """Keep the moments until the window is full, then move the buffer by all of them."""
    assert thread.window is not None
    thread.window.add(buffer, moments, move)
