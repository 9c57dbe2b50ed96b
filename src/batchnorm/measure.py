"""Measures time and memory.

Timing is robust on a busy machine: all functions run alternately, and medians are reported. Memory is that of torch's allocator: its peak
in a call, and the bytes that a training step saves for its backward.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

# Seconds: a shorter call is repeated within one sample, so that the cost of the clock is negligible and the caches contain the
# call's own data.
SAMPLE = 4e-3

# Seconds: a longer call fills the caches with its own data and code in a small part of its time.
FILLS_CACHES = 0.1


@dataclass(frozen=True)
class Effort:
    """How long to measure: until `seconds` have passed, but at least `least` and at most `most` rounds."""

    seconds: float
    least: int = 5
    most: int = 200


Clock = Callable[[], float]


def clock_for(threads: int) -> tuple[Clock, str]:
    """The clock for calls on this number of threads, and the name of its metric.

    The processor time of a single thread does not advance while other processes use the core; otherwise it equals the elapsed time.
    """
    return (time.thread_time, "processor time") if threads == 1 else (time.perf_counter, "time")


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    effort: Effort,
    clock: Clock = time.perf_counter,
    watch: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of each function by `clock`, one entry per round; each round calls all of them in a random order.

    A short function first runs a sample without the clock, so that the caches contain its own tensors and code, as in a loop, and not
    those of the previous function. `watch` is the clock for the effort's seconds.
    """
    order, shuffle = list(functions), random.Random(0).shuffle
    seconds = {name: _seconds(function, clock) for name, function in functions.items()}
    repeats = {name: max(1, math.ceil(SAMPLE / max(once, 1e-9))) for name, once in seconds.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, rounds = watch(), 0
        while rounds < effort.least or (rounds < effort.most and watch() - start < effort.seconds):
            shuffle(order)
            for name in order:
                if seconds[name] < FILLS_CACHES:
                    _sample(functions[name], repeats[name], clock)
                samples[name].append(_sample(functions[name], repeats[name], clock))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def _sample(function: Callable[[], object], repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        function()
    return (clock() - start) / repeats


def _seconds(function: Callable[[], object], clock: Clock) -> float:
    """Seconds per call. The first call warms up; if it is short, it is timed again."""
    once = _sample(function, 1, clock)
    return min(_sample(function, 1, clock) for _ in range(3)) if once < 10 * SAMPLE else once


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile, interpolated linearly between the nearest ranks, as numpy does by default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def geometric_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """exp of the weighted mean of logarithms."""
    weights = [1.0] * len(values) if weights is None else weights
    return math.exp(math.fsum(w * math.log(v) for v, w in zip(values, weights, strict=True)) / math.fsum(weights))


def digits(value: float) -> float:
    """Round to four digits, more than are significant on a busy machine."""
    return float(f"{value:.4g}")


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak memory of torch's allocator during a call, above its memory before the call."""
    _, changes = _traced(function)
    return max(accumulate(changes), default=0)


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Memory saved for the backward: bytes that stay allocated while the result of a call exists, without the result itself.

    The first call warms up. All memory counts, whether hooks, recipes or compiled code hold it.
    """
    function()
    result, changes = _traced(function)
    return sum(changes) - result.untyped_storage().nbytes()


def _traced(function: Callable[[], Result]) -> tuple[Result, list[int]]:
    """The result, and the bytes that torch's allocator allocated (+) and freed (-) during the call, in order."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes to stderr
    # With acc_events, torch 2.11 does not warn of events that only a second cycle would lose.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        result = function()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return result, [event.nbytes() for event in events]  # pyright: ignore[reportAttributeAccessIssue] (missing in torch's stubs)
