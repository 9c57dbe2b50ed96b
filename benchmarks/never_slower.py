"""What the rows of `batchnorm bench --suite never-slower` say, as the tables of docs/kernels.md.

    python benchmarks/never_slower.py          # a second; prints the tables of the committed rows
    python benchmarks/never_slower.py my.csv   # of yours

A number is the speed of our layer relative to torch's layer run in the same way, by medians; a mean is the geometric one, over all layers.
Where a second instance of torch's layer was measured, its cases are counted too: so many fall below by chance.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from batchnorm.bench.row import threads as words
from batchnorm.bench.targets import COMPARED
from batchnorm.measure import geometric_mean

RESULTS = Path(__file__).parent / "results"
FILES = ("never_slower_avx512", "never_slower", "never_slower_compiled", "never_slower_without_library")
SMALL = 64 * 1024  # bytes
LEAST = 0.95

Row = dict[str, str]


class Case(NamedTuple):
    """The rows of one case: torch's layer, ours, and the second instance of torch's if it was measured."""

    torch: Row
    ours: Row
    again: Row | None

    @property
    def setting(self) -> tuple[str, str]:
        return self.ours["threads"], self.ours["dtype"]

    def speed(self, of: Row) -> float:
        return float(self.torch["p50"]) / float(of["p50"])

    def most(self, of: Row) -> float:
        """The speed from torch's 80th percentile to the other's 20th."""
        return float(self.torch["p80"]) / float(of["p20"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[RESULTS / f"{name}.csv" for name in FILES])
    for path in parser.parse_args().files:
        print(path.name, "", *table(path), "", sep="\n")


def table(path: Path) -> Iterator[str]:
    """The lines of a Markdown table, with a column for each number of threads and dtype."""
    with path.open(newline="") as file:
        cases = list(_compared(csv.DictReader(file)))
    settings = sorted({case.setting for case in cases})
    columns = [[case for case in cases if case.setting == setting] for setting in settings]
    yield f"| | {' | '.join(f'{dtype}, {words(int(threads))}' for threads, dtype in settings)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for title, cell in _lines():
        cells = [cell(column) for column in columns]
        if any(cells):
            yield f"| {title} | {' | '.join(cells)} |"


def _compared(rows: Iterable[Row]) -> Iterator[Case]:
    found: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        key = ("shape", "count", "epilogue", "layout", "dtype", "direction", "threads")
        found[tuple(row[name] for name in key)][row["provider"]] = row
    for providers in found.values():
        for torchs, (ours, again) in COMPARED.items():
            if {torchs, ours} <= providers.keys():
                yield Case(providers[torchs], providers[ours], providers.get(again))


def _lines() -> Iterator[tuple[str, Callable[[Sequence[Case]], str]]]:
    """The title of each line, and what a cell says of the cases of its column; "" if nothing."""
    directions, layouts = ("forward", "step", "inference"), ("planar", "channels_last")
    for direction, layout in product(directions, layouts):
        yield f"{direction}, {layout}", _mean({"direction": direction, "layout": layout})
    for direction in directions:
        yield f"{direction}, tensors up to {SMALL // 1024} KB", _mean({"direction": direction}, SMALL)
    yield f"cases below {LEAST}", lambda cases: _count(case.speed(case.ours) for case in cases)
    yield "of these beyond the spread", lambda cases: _count(case.most(case.ours) for case in cases)
    yield (
        "torch's layers against themselves, below",
        lambda cases: _count(case.speed(case.again) for case in cases if case.again),
    )
    yield "of these beyond the spread", lambda cases: _count(case.most(case.again) for case in cases if case.again)


def _mean(where: dict[str, str], most: float = float("inf")) -> Callable[[Sequence[Case]], str]:
    def mean(cases: Sequence[Case]) -> str:
        chosen = [
            case for case in cases if where.items() <= case.ours.items() and int(case.ours["tensor_bytes"]) <= most
        ]
        return f"{geometric_mean([case.speed(case.ours) for case in chosen]):.2f}" if chosen else ""

    return mean


def _count(speeds: Iterable[float]) -> str:
    found = list(speeds)
    return f"{sum(speed < LEAST for speed in found)} of {len(found)}" if found else ""


if __name__ == "__main__":
    main()
