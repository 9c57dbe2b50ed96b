"""Whole training steps in several processes, which differ from each other more than the rounds of one: where tensors lie is luck.

    python benchmarks/steps.py                      # prints the table of docs/switching.md from the committed rows
    python benchmarks/steps.py --csv my.csv -- --model resnet18 --batch 8 --threads 2    # measures, adds rows to the file, prints its table

Each process is `batchnorm bench` with the options after `--`, for torch's layers, ours, and torch's in a second model, eager and compiled.
Its rows are added when it ends. A number is the speed relative to torch's layers run in the same way in the same process: the median of the
processes, the least and the most.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.progress import track

from batchnorm.measure import percentile

Row = dict[str, str]

RESULTS = Path(__file__).parent / "results" / "steps.csv"
COLUMNS = {
    "ours": "after `convert`",
    "eager again": "torch's layers again",
    "compile ours": "compiled, after `convert`",
    "compile again": "torch's layers compiled again",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=6, help="how many, one after the other (default: 6)")
    parser.add_argument(
        "--csv", type=Path, default=RESULTS, help=f"file of the rows (default: {RESULTS.name} beside the others)"
    )
    parser.add_argument("options", nargs="*", help="of `batchnorm bench`")
    given = parser.parse_args()
    if given.options:
        for _ in track(range(given.processes), description="processes"):
            add(given.csv, rows_of(given.options))
    print(*table(read(given.csv)), sep="\n")


def rows_of(options: Sequence[str]) -> list[Row]:
    """The rows of one process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        providers = ",".join(["compile", *COLUMNS])
        command = [sys.executable, "-m", "batchnorm", "bench", "--provider", providers, *options, "--csv", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        return read(path)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a file, which gets a header if it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a Markdown table."""
    speeds: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    torchs: dict[str, float] = {}  # of this process: in its rows they come first
    for row in rows:
        provider, time = row["provider"], float(row["p50"])
        like = "compile" if provider.startswith("compile") else "eager"
        if provider == like:
            torchs[like] = time
        else:
            layout = row["layout"] if row["shape"].count("x") == 3 else ""
            speeds[f"{row['suite']} {row['shape']}", layout, row["threads"]][provider].append(torchs[like] / time)
    yield f"| network | layout | threads | {' | '.join(COLUMNS.values())} |"
    yield f"|{'---|' * (3 + len(COLUMNS))}"
    for setting, found in speeds.items():
        cells = (_cell(found[provider]) for provider in COLUMNS)
        yield f"| {' | '.join(setting)} | {' | '.join(cells)} |"


def _cell(found: Sequence[float]) -> str:
    median, least, most = (f"{percentile(found, at):.2f}" for at in (50, 0, 100))
    return f"{median} ({least} to {most})"


if __name__ == "__main__":
    main()
