"""How much a call allocates, and how much a training step keeps for its backward."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that torch's allocator held during a call, above what it held before."""
    _, changes = _traced(function)
    return max(accumulate(changes), default=0)


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """What a call leaves allocated as long as its result lives, without the result itself: what was kept for the backward.

    The first call warms up. Counted is what the allocator still holds, whatever way it is kept: by hooks, recipes or compiled code.
    """
    function()
    result, changes = _traced(function)
    return sum(changes) - result.untyped_storage().nbytes()


def _traced(function: Callable[[], Result]) -> tuple[Result, list[int]]:
    """The result, which is alive, and the bytes that torch's allocator took and gave back until then, in that order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return result, [event.nbytes() for event in events]  # pyright: ignore[reportAttributeAccessIssue] (missing in torch's stubs)
