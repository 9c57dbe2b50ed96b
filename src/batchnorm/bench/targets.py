"""What is promised, and what rows say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from batchnorm.bench.row import Row
from batchnorm.bench.timing import geometric_mean

LARGE = 4 * 2**20  # bytes of a tensor from which on memory is the limit


@dataclass(frozen=True)
class Target:
    """An upper bound of the ratio to the byte limit, and lower bounds of how many times faster than the others."""

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
TINY = 1 / 1.05  # of eager's speed, for every tensor of at most 64 KB, layer included


class Group(NamedTuple):
    """Rows that are averaged: they differ in shape and provider alone."""

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
    """A group in numbers: geometric means over its shapes, each counted as often as the network has it.

    Attributes:
        group: what it is of.
        shapes: how many.
        ratio_to_limit: of each provider.
        faster: by which factor ours is faster than each other provider, over the shapes both have.
        worst: the least such factor over eager.
        target: what was promised of this group, or None.
    """

    group: Group
    shapes: int
    ratio_to_limit: dict[str, float]
    faster: dict[str, float]
    worst: float
    target: Target | None

    @property
    def holds(self) -> bool | None:
        """Whether all that was promised came true; None where nothing was."""
        if self.target is None:
            return None
        if self.target.limit is None:
            return self.worst >= (self.target.eager or 0.0)
        wanted = {name: getattr(self.target, name) for name in ("eager", "compile", "onednn")}
        return self.ratio_to_limit["ours"] <= self.target.limit and all(
            self.faster[name] >= factor for name, factor in wanted.items() if factor is not None and name in self.faster
        )


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Every group of the functions' large tensors, and of the layers; in the rows' order."""
    groups: dict[Group, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row.case.startswith("replicas"):
            continue  # nothing is promised of what another process takes
        if row.ratio_to_limit is not None and (row.tensor_bytes > LARGE or row.case.startswith("layer")):
            group = Group(*(getattr(row, name) for name in Group._fields))
            groups.setdefault(group, {}).setdefault(row.provider, {})[row.shape] = row
    return [_summary(group, providers) for group, providers in groups.items() if "ours" in providers]


def _summary(group: Group, providers: dict[str, dict[str, Row]]) -> Summary:
    ours = providers["ours"]

    def mean(values: dict[str, float]) -> float:
        return geometric_mean(list(values.values()), [ours[shape].count for shape in values])

    def ratios(of: dict[str, Row]) -> dict[str, float]:
        return {shape: row.ratio_to_limit for shape, row in of.items() if row.ratio_to_limit is not None}

    factors = {
        name: {shape: row.p50 / ours[shape].p50 for shape, row in of.items()}
        for name, of in providers.items()
        if name not in ("ours", "copy")
    }
    return Summary(
        group,
        len(ours),
        {name: mean(ratios(of)) for name, of in providers.items()},
        {name: mean(of) for name, of in factors.items()},
        min(factors["eager"].values()),
        _target(group),
    )


def _target(group: Group) -> Target | None:
    if group.case.startswith("layer"):
        return Target(None, eager=TINY)
    without_activation = group.epilogue in ("BN", "BN+add")
    if group.dtype not in ("float32", "bfloat16") or (without_activation and group.direction != "inference"):
        return None
    return TARGETS.get((group.direction, group.layout))
