"""How much of what small normalization batches lose the parts of `batchnorm.statistics` get back.

    python benchmarks/normalization_batch.py    # 20 minutes on one core; prints the table, writes the rows

The trainings are those of the lab's experiment `batch-size` (`batchnorm lab run batch-size`), here for every part and size asked for, as
rows; there the protocol is told. Errors are of its validation and test images together.

recovered = (error of plain - error of the part) / (error of plain - error of plain at 64), plain at the same normalization batch.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import batchnorm as bn
from batchnorm import env
from batchnorm.lab.data import digits
from batchnorm.lab.experiments.batch_size import ARMS, BATCH, SMALL, errors

RESULTS = Path(__file__).parent / "results" / "normalization_batch.csv"
EPOCHS = 10
SEEDS = 3


@dataclass(frozen=True)
class Row:
    """One part at one normalization batch.

    Attributes:
        setting: noise or sorted.
        part: its name.
        normalization_batch: samples that share statistics.
        seeds: trainings.
        error: mean share of held-out images that are classified wrong.
        deviation: of the seeds' errors.
        recovered: share of plain's loss against 64; None where plain lost nothing or is itself the part.
    """

    setting: str
    part: str
    normalization_batch: int
    seeds: int
    error: float
    deviation: float
    recovered: float | None = None


def error(part: str, setting: str, size: int, seed: int, epochs: int) -> float:
    """The error on held-out images after one training."""
    data = digits.load()
    held_out = len(data.validation), len(data.test)
    shares = zip(errors(part, setting, size, seed, epochs), held_out, strict=True)
    return sum(share * count for share, count in shares) / sum(held_out)


def sweep(
    parts: Sequence[str], sizes: Sequence[int], seeds: int, epochs: int, workers: int, report: Callable[[str], None]
) -> list[Row]:
    """Every setting, part and normalization batch; plain and 64 must come first. Results do not depend on the number of workers."""
    cells = [
        (part, setting, size)
        for setting, smallest in SMALL.items()
        for part in parts
        for size in sizes
        if size >= smallest and (part != "group_norm" or size == BATCH)  # which knows no batch
    ]
    rows = list[Row]()
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running = [[pool.submit(error, *cell, seed, epochs) for seed in range(seeds)] for cell in cells]
        for (part, setting, size), trainings in zip(cells, running, strict=True):
            errors = [training.result() for training in trainings]
            deviation = statistics.stdev(errors) if seeds > 1 else 0.0
            row = _with_recovered(Row(setting, ARMS[part], size, seeds, statistics.fmean(errors), deviation), rows)
            rows.append(row)
            back = "" if row.recovered is None else f"  {row.recovered:5.0%} back"
            report(f"{setting:7} {part:15} {size:3}  {100 * row.error:5.1f} ± {100 * deviation:.1f} %{back}")
    return rows


def _with_recovered(row: Row, rows: Sequence[Row]) -> Row:
    errors = {
        other.normalization_batch: other.error
        for other in rows
        if (other.setting, other.part) == (row.setting, ARMS["plain"])
    }
    small, large = errors.get(row.normalization_batch), errors.get(BATCH)
    if row.part == ARMS["plain"] or small is None or large is None or small <= large:
        return row
    return replace(row, recovered=(small - row.error) / (small - large))


def write(path: Path, rows: Sequence[Row]) -> None:
    machine = {"torch": torch.__version__, "batchnorm": bn.__version__, "cpu": env.machine().cpu}
    machine["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *machine])
        writer.writeheader()
        for row in rows:
            rounded = {
                name: f"{value:.4f}" if isinstance(value, float) else value for name, value in asdict(row).items()
            }
            writer.writerow(rounded | machine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--parts", nargs="+", choices=list(ARMS), default=list(ARMS), help="plain is the first")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 16, 8, 4, 2], help="64 is the first")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="where the rows go")
    arguments = parser.parse_args()
    report = partial(print, flush=True)
    tried = arguments.parts, arguments.sizes, arguments.seeds, arguments.epochs, arguments.workers
    write(arguments.csv, sweep(*tried, report))


if __name__ == "__main__":
    main()
