"""Measures how much memory a call allocates, and how much a training step saves for its backward."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak memory of torch's allocator during a call, beyond the memory before."""
    _, changes = _traced(function)
    return max(accumulate(changes), default=0)


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Memory that stays allocated while the result of a call exists, without the result: what is saved for the backward.

    The first call warms up. All memory counts, whether hooks, recipes or compiled code hold it.
    """
    function()
    result, changes = _traced(function)
    return sum(changes) - result.untyped_storage().nbytes()


def _traced(function: Callable[[], Result]) -> tuple[Result, list[int]]:
    """The result, and the bytes that torch's allocator allocated (+) and freed (-) until then, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return result, [event.nbytes() for event in events]  # pyright: ignore[reportAttributeAccessIssue] (missing in torch's stubs)
