"""Measures every case with every provider: times, errors and memory, as rows."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import torch

from batchnorm.bench import device
from batchnorm.bench.accuracy import Exact
from batchnorm.bench.case import Case, Tensors, tensors
from batchnorm.bench.providers import SOURCES, Compile, Provider, Timed
from batchnorm.bench.row import UNITS, Row, circumstances
from batchnorm.bench.targets import COMPARED, TINY
from batchnorm.measure import Effort, digits, percentile

CONFIRMING = 4  # times more, each with other instances, for a layer that seems slower than torch's
MICROSECONDS_BELOW = 64 * 1024  # bytes: smaller tensors are timed in microseconds, larger ones in milliseconds


def run(cases: Sequence[Case], providers: Sequence[Provider], seconds: float, least: int = 5) -> Iterator[list[Row]]:
    """Measure each case and yield its rows, one per provider that accepts it; about `seconds` for all.

    Every case gets an equal share of the remaining time, but at least `least` rounds, so large cases with slow providers can take longer.
    A layer that seems slower than torch's is measured four times more, each time with other instances of all: of thousands of cases some
    are disturbed, and two instances of the same layer differ by where they lie in memory.
    """
    deadline = time.perf_counter() + seconds
    for _, alike in groupby(enumerate(cases), key=lambda numbered: _same_tensors(numbered[1])):
        given = None
        for _, same_result in groupby(alike, key=lambda numbered: numbered[1].direction):
            exact, peaks = None, dict[tuple[str, str], int]()
            for index, case in same_result:
                if (missing := device.missing_for(case)) is not None:
                    warnings.warn(f"{case.shape} is left out: {missing}", stacklevel=2)
                    yield []
                    continue
                given = tensors(case) if given is None else given
                exact = Exact(case, given) if exact is None else exact
                share = max(deadline - time.perf_counter(), 0.0) / (len(cases) - index)
                with settled(case.threads), device.controlled(case.outputs, case.device):
                    found = _measure(case, given, exact, peaks, providers, Effort(share, least))
                yield found


def _same_tensors(case: Case) -> tuple[object, ...]:
    return case.suite, case.layer, case.layout, case.dtype, case.device


@contextmanager
def settled(threads: int) -> Iterator[None]:
    """Set torch's number of threads in this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(
    case: Case,
    given: Tensors,
    exact: Exact,
    peaks: dict[tuple[str, str], int],
    providers: Sequence[Provider],
    effort: Effort,
) -> list[Row]:
    """Measure one case; `peaks`, by outputs and provider, are reused for other numbers of threads."""
    start = time.perf_counter()
    providers = [provider for provider in providers if provider.refuses(case) is None]
    errors = dict[str, float | None]()
    with torch.set_grad_enabled(case.needs_grad):
        timed = _prepared(case, given, providers)
        for provider in providers:
            name, function = provider.name, timed[provider.name]
            errors[name] = None if name == "copy" or provider in SOURCES else exact.error(function()[0])
            if (case.outputs, name) not in peaks:
                peaks[case.outputs, name] = device.peak_bytes(function, case.device)
        left = replace(effort, seconds=effort.seconds - (time.perf_counter() - start))
        samples = device.samples(timed, left, case.device, case.outputs, case.threads)
        if case.through == "layer" and _seems_slower(samples):
            rounds = len(samples["eager"])
            for _ in range(CONFIRMING):
                timed = _prepared(case, given, providers)
                more = device.samples(timed, Effort(0.0, rounds), case.device, case.outputs, case.threads)
                samples = {name: values + more[name] for name, values in samples.items()}
    return rows(case, samples, errors, {name: peaks[case.outputs, name] for name in samples})


def _prepared(case: Case, given: Tensors, providers: Sequence[Provider]) -> dict[str, Timed]:
    """The functions to time, by provider."""
    if any(isinstance(provider, Compile) for provider in providers):
        torch.compiler.reset()  # after 8 shapes a function would no longer be compiled
    return {provider.name: provider.prepare(case, given) for provider in providers}


def _seems_slower(samples: Mapping[str, list[float]]) -> bool:
    """Whether our layer took longer than torch's, or one instance of torch's longer than another, eager or compiled."""
    median = {name: percentile(values, 50) for name, values in samples.items()}
    pairs = ((name, other) for name, others in COMPARED.items() for other in others)
    return any(median[name] < TINY * median[other] for name, other in pairs if {name, other} <= median.keys())


def rows(
    case: Case,
    samples: dict[str, list[float]],
    errors: Mapping[str, float | None],
    peaks: Mapping[str, int | None],
) -> list[Row]:
    """The rows of a case from the seconds of each round; the byte limit is computed from those of "copy"."""
    unit = "us" if case.tensor_bytes <= MICROSECONDS_BELOW else "ms"
    median = {name: percentile(values, 50) for name, values in samples.items()}
    limit = median["copy"] * case.passes / case.tensors

    def row(name: str, values: list[float]) -> Row:
        p20, p50, p80 = (percentile(values, percent) * UNITS[unit] for percent in (20, 50, 80))
        return Row(
            suite=case.suite,
            case=f"{case.through} {case.direction}",
            shape=case.shape,
            count=case.layer.count,
            epilogue=case.epilogue,
            layout=case.layout,
            dtype=case.dtype,
            direction=case.direction,
            outputs=case.outputs,
            threads=case.threads,
            provider=name,
            metric=f"{device.metric_of(case.device, case.threads)} per call",
            unit=unit,
            p20=digits(p20),
            p50=digits(p50),
            p80=digits(p80),
            rounds=len(values),
            tensor_bytes=case.tensor_bytes,
            limit=digits(limit * UNITS[unit]),
            ratio_to_limit=digits(median[name] / (median["copy"] if name == "copy" else limit)),
            ratio_to_eager=digits(median["eager"] / median[name]),
            max_error=None if (error := errors[name]) is None else digits(error),
            peak_bytes=peaks[name],
            saved_bytes=None,
            device=device.name_of(case.device),
            **circumstances(),
        )

    return [row(name, values) for name, values in samples.items()]
