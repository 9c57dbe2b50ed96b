"""Memory: where outputs come from, how much a call allocates, and how much a training step keeps for its backward."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TypeVar

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from batchnorm.errors import InputError

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # glibc's malloc.h
LARGEST_THRESHOLD = 32 * 2**20  # where glibc's own adjustment ends

Result = TypeVar("Result")


@contextmanager
def outputs(kind: str) -> Iterator[None]:
    """Let allocations be "reused", from memory that was written before, or "fresh", from where glibc gets them by default.

    Above 32 MB glibc maps untouched pages for each allocation and gives them back after it, and the first write to each page is
    a fault: for a copy that costs several times the copying. Kept in the heap, freed memory is handed out again.

    Raises:
        InputError: "reused" was asked for without glibc.
    """
    if kind == "fresh":
        yield
        return
    if platform.libc_ver()[0] != "glibc":
        raise InputError("outputs can be reused only where glibc allocates; use --outputs fresh")
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # glibc adjusts nothing by itself after the first mallopt: give it what its adjustment ends at
        libc.mallopt(MMAP_MAX, 65536)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        libc.malloc_trim(0)


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
