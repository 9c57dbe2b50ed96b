"""Measures on a GPU: calls are timed by events in its stream, with its L2 cache flushed before each call, or as the call before left it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from batchnorm.bench import memory
from batchnorm.bench.case import Case
from batchnorm.measure import Clock, Effort, clock_for, interleaved
from batchnorm.measure import peak_bytes as peak_bytes_on_cpu

FLUSH = 256 * 2**20  # bytes to write, several times the L2 cache of any GPU
FLUSHES = 12  # for each call that is timed: some 0.6 ms on an H200, in which the host queues the call
CALLS = 8  # of a function in one sample, one after the other, without a flush
WARM_UP = 3  # calls before the first sample: programs are compiled, memory is cached, clocks rise


def name_of(device: str) -> str:
    """The device in words, for rows."""
    return device if device == "cpu" else f"{device}: {torch.cuda.get_device_name()}"


def metric_of(device: str, threads: int) -> str:
    """What a sample counts."""
    return clock_for(threads)[1] if device == "cpu" else "time on the device"


def samples(
    timed: Mapping[str, Callable[[], object]], effort: Effort, device: str, outputs: str, threads: int
) -> dict[str, list[float]]:
    """Seconds per call of each function, one entry per round; each round calls all of them in a random order."""
    if device == "cpu":
        return interleaved(timed, effort, clock_for(threads)[0])
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    return by_events(timed, effort, partial(_seconds_on_device, flush, outputs == "flushed"))


def by_events(
    timed: Mapping[str, Callable[[], object]],
    effort: Effort,
    seconds_of: Callable[[Callable[[], object]], float],
    watch: Clock | None = None,
) -> dict[str, list[float]]:
    """`measure.interleaved`, where `seconds_of` times a call."""
    watch = clock_for(2)[0] if watch is None else watch
    order, shuffle = list(timed), random.Random(0).shuffle
    for function in timed.values():
        for _ in range(WARM_UP):
            function()
    found: dict[str, list[float]] = {name: [] for name in timed}
    start, rounds = watch(), 0
    while rounds < effort.least or (rounds < effort.most and watch() - start < effort.seconds):
        shuffle(order)
        for name in order:
            found[name].append(seconds_of(timed[name]))
        rounds += 1
    return found


def _seconds_on_device(flush: Tensor, cold: bool, function: Callable[[], object]) -> float:
    """Of one call after a flush, or of one of several calls after another that filled the cache with their tensors.

    The flush is written in both cases, so often that the host queues all that is timed meanwhile: its own time does not show.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
    calls = 1 if cold else CALLS
    for _ in range(FLUSHES * calls):
        flush.zero_()
    if not cold:
        function()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Peak memory of torch's allocator during a call, above its memory before the call."""
    if device == "cpu":
        return peak_bytes_on_cpu(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def controlled(outputs: str, device: str) -> AbstractContextManager[None]:
    """The memory of outputs, which torch caches on a GPU by itself."""
    return memory.outputs(outputs) if device == "cpu" else nullcontext()


def missing_for(case: Case) -> str | None:
    """Why a case does not fit into the memory that is free now, or None."""
    if case.device == "cpu":
        return memory.missing_for(case)
    needed, free = memory.TENSORS * case.tensor_bytes, torch.cuda.mem_get_info()[0]
    return (
        None
        if needed <= free
        else f"it needs {needed / 1e9:.1f} GB of the GPU's memory, and {free / 1e9:.1f} GB are free"
    )
