"""Targets of the benchmarks, and whether rows meet them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from batchnorm.bench.case import CACHES
from batchnorm.bench.row import Row
from batchnorm.measure import geometric_mean

Verdict = Literal["held", "missed", "too noisy", ""]
LARGE = 4 * 2**20  # bytes; above this size memory bandwidth is the limit


@dataclass(frozen=True)
class Target:
    """The largest ratio to the byte limit, and the smallest speedups over other providers."""

    limit: float | None
    eager: float | None = None
    compile: float | None = None
    onednn: float | None = None


TARGETS = {
    ("forward", "planar"): Target(1.3, eager=5.0, compile=3.0, onednn=3.0),
    ("forward", "channels_last"): Target(1.3, eager=3.0),
    ("backward", "planar"): Target(1.4, eager=4.0),
    ("backward", "channels_last"): Target(1.3, eager=3.0),
    ("inference", "planar"): Target(1.15),
    ("inference", "channels_last"): Target(1.15),
}
# On a GPU, in bfloat16 with the L2 cache flushed; a step is of BN + add + ReLU.
ON_GPU = {
    ("forward", "planar"): Target(1.25, eager=0.95),
    ("forward", "channels_last"): Target(1.2, eager=0.95),
    ("backward", "planar"): Target(1.2, eager=0.95),
    ("backward", "channels_last"): Target(1.2, eager=0.95),
    ("step", "planar"): Target(math.inf, eager=1.3, compile=1.15),
    ("step", "channels_last"): Target(math.inf, eager=1.3, compile=1.15),
}
TINY = 1 / 1.05  # the smallest speedup of layers over torch's

# What is never to be slower than torch's layer: ours, run in the same way, and another instance of torch's.
COMPARED = {"eager": ("ours", "eager again"), "compile": ("compile ours", "compile again")}


class Group(NamedTuple):
    """The key of rows that are averaged: they differ only in shape and provider."""

    suite: str
    case: str
    layout: str
    dtype: str
    epilogue: str
    outputs: str
    threads: int

    @property
    def direction(self) -> str:
        return self.case.split()[-1]


@dataclass(frozen=True)
class Summary:
    """Geometric means of a group over its shapes, weighted by the number of layers.

    Attributes:
        group: the group.
        shapes: number of shapes.
        ratio_to_limit: ratio to the byte limit of each provider.
        faster: speedup of ours over each other provider, over the shapes that both have.
        worst: the smallest speedup over eager, and of compiled layers over torch's.
        below: how many of these speedups are less than `TINY`.
        itself: `worst` and `below` of other instances of torch's layers over these, which is what chance brings; None if they were not
            measured.
        bounds: the smallest and the largest value of these numbers that the spread of the measurements allows, from the 20th to the
            80th percentile: of the ratio to the limit as "limit", of the speedups by provider, of the smallest speedup as "worst".
        target: the target of this group, or None.
    """

    group: Group
    shapes: int
    ratio_to_limit: dict[str, float]
    faster: dict[str, float]
    worst: float
    below: int
    itself: tuple[float, int] | None
    bounds: dict[str, tuple[float, float]]
    target: Target | None

    @property
    def verdict(self) -> Verdict:
        """Whether all targets are met; "" if there are none.

        It is "too noisy" if the spread of the measurements allows both answers, or torch's layers miss the target against themselves by
        as much.
        """
        target = self.target
        if target is None:
            return ""
        if target.limit is None:
            least = {"worst": target.eager or 0.0}
        else:
            wanted = {name: getattr(target, name) for name in ("eager", "compile", "onednn")}
            least = {name: value for name, value in wanted.items() if value is not None and name in self.faster}
        low, high = self.bounds["limit"]
        most = float("inf") if target.limit is None else target.limit
        if high <= most and all(self.bounds[name][0] >= value for name, value in least.items()):
            return "held"
        if self.itself is not None and "worst" in least:
            least["worst"] = min(least["worst"], self.itself[0])
        if low > most or any(self.bounds[name][1] < value for name, value in least.items()):
            return "missed"
        return "too noisy"


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Summaries of all groups of functions on large tensors and of layers, in the order of the rows."""
    groups: dict[Group, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row.case.startswith("replicas"):
            continue  # no target depends on another process
        if row.ratio_to_limit is not None and (row.tensor_bytes > LARGE or row.case.startswith("layer")):
            group = Group(*(getattr(row, name) for name in Group._fields))
            groups.setdefault(group, {}).setdefault(row.provider, {})[row.shape] = row
    return [_summary(group, found) for group, found in groups.items() if _is_compared(group, found)]


def _is_compared(group: Group, providers: Mapping[str, object]) -> bool:
    """Whether ours is among them: layers may be measured compiled alone."""
    compiled = group.case.startswith("layer") and {"compile", "compile ours"} <= providers.keys()
    return "ours" in providers or compiled


def _summary(group: Group, providers: dict[str, dict[str, Row]]) -> Summary:
    ours = providers.get("ours") or providers["compile ours"]

    def mean(values: dict[str, float]) -> float:
        return geometric_mean(list(values.values()), [ours[shape].count for shape in values])

    def ratios(of: dict[str, Row]) -> dict[str, float]:
        return {shape: row.ratio_to_limit for shape, row in of.items() if row.ratio_to_limit is not None}

    skipped = ["copy", *(name for names in COMPARED.values() for name in names)]
    if "ours" not in providers:
        skipped.append("eager")
    others = [name for name in providers if name not in skipped]

    def factors(theirs: str, own: str) -> dict[str, dict[str, float]]:
        """Speedups by provider and shape; compiled layers of ours are compared with compiled ones."""
        found = dict[str, dict[str, float]]()
        for name in others:
            of_ours = providers.get(f"{name} ours", ours)
            found[name] = {
                shape: getattr(row, theirs) / getattr(of_ours[shape], own)
                for shape, row in providers[name].items()
                if shape in of_ours
            }
        return found

    faster, low, high = factors("p50", "p50"), factors("p20", "p80"), factors("p80", "p20")

    def worst(of: dict[str, dict[str, float]]) -> float:
        return min(all_of(of))

    def all_of(of: dict[str, dict[str, float]]) -> list[float]:
        """The speedups over torch's layers."""
        return [factor for name in COMPARED for factor in of.get(name, {}).values()]

    itself = [
        providers[name][shape].p50 / row.p50
        for name, (_, again) in COMPARED.items()
        for shape, row in providers.get(again, {}).items()
        if name in providers
    ]
    limits = ratios(ours)
    bounds = {
        "limit": tuple(
            mean({shape: ratio * getattr(ours[shape], name) / ours[shape].p50 for shape, ratio in limits.items()})
            for name in ("p20", "p80")
        ),
        "worst": (worst(low), worst(high)),
        **{name: (mean(low[name]), mean(high[name])) for name in others},
    }
    return Summary(
        group,
        len(ours),
        {name: mean(ratios(of)) for name, of in providers.items()},
        {name: mean(of) for name, of in faster.items()},
        worst(faster),
        _below(all_of(faster)),
        (min(itself), _below(itself)) if itself else None,
        bounds,
        _target(group),
    )


def _below(speedups: Sequence[float]) -> int:
    return sum(speedup < TINY for speedup in speedups)


def _target(group: Group) -> Target | None:
    if group.outputs in CACHES:
        fits = group.outputs == "flushed" and group.dtype == "bfloat16"
        fits = fits and (group.direction != "step" or group.epilogue == "BN+add+relu")
        return ON_GPU.get((group.direction, group.layout)) if fits else None
    if group.case.startswith("layer"):
        return Target(None, eager=TINY)
    without_activation = group.epilogue in ("BN", "BN+add")
    if group.dtype not in ("float32", "bfloat16") or (without_activation and group.direction != "inference"):
        return None
    return TARGETS.get((group.direction, group.layout))
