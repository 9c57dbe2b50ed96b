"""How much of what small normalization batches lose the parts of `batchnorm.statistics` get back.

    python benchmarks/normalization_batch.py    # 20 minutes on one core; prints the table, writes the rows

The tutorial's 784-512-256-10 network on scikit-learn's digits at 28x28, SGD with batches of 64, momentum 0.9, a learning rate of 0.05 that
falls by a cosine, 10 epochs. Every batch of 64 goes through the linear layers at once and through a batch norm in groups of 2 to 64 (the
normalization batch), as if each group were on a device of its own: only the statistics change. The running statistics move with
every group, by a momentum of 0.1 for 64 samples. Two settings: noise of 1.5 deviations on the images with groups at random; no noise with
the batch sorted by class, so that a group shows one class or two. Errors are of 600 held-out images, by the running statistics.

recovered = (error of plain - error of the part) / (error of plain - error of plain at 64), plain at the same normalization batch.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import env
from batchnorm.lab.data import Examples, digits
from batchnorm.lab.networks import tutorial_network
from batchnorm.lab.train import accuracy, batches
from batchnorm.statistics import Batch, Ghost, MovingAverage, Renorm, Statistics

RESULTS = Path(__file__).parent / "results" / "normalization_batch.csv"
BATCH = 64
EPOCHS = 10
SEEDS = 3
# Setting, smallest normalization batch, and what the best part is to recover there.
PROMISES = (("noise", 2, 0.60), ("sorted", 4, 0.85))


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


class InGroups(nn.Module):
    """A layer that in training sees every `size` samples alone."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(group) for group in x.split(self.size)]) if self.training else self.layer(x)


def normalized(part: Statistics, channels: int, size: int) -> nn.Module:
    return InGroups(bn.BatchNorm1d(channels, momentum=0.1 * size / BATCH, statistics=part), size)


def plain(channels: int, size: int, _: int) -> nn.Module:
    return normalized(Batch(), channels, size)


def ghost(channels: int, size: int, _: int) -> nn.Module:
    """The groups inside one call, and running statistics that follow the whole batch."""
    return bn.BatchNorm1d(channels, statistics=Ghost(size))


def renorm(channels: int, size: int, steps: int) -> nn.Module:
    """Plain for a twentieth of the training, with the full bounds after two fifths."""
    return normalized(Renorm(warmup=steps * BATCH // size // 20), channels, size)


def moving_average(channels: int, size: int, steps: int) -> nn.Module:
    """Averages over as many groups as a batch has."""
    groups = BATCH // size
    return normalized(MovingAverage(groups, warmup=steps * groups // 20), channels, size)


def group_norm(channels: int, *_: int) -> nn.Module:
    """No batch at all (Wu & He 2018), beside which the parts have to stand."""
    return nn.GroupNorm(8, channels)


PARTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "plain": plain,
    "Ghost": ghost,
    "Renorm": renorm,
    "MovingAverage": moving_average,
    "group norm": group_norm,
}


def network(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    layers = tutorial_network(batch_norm=True)
    for name, layer in layers.named_children():
        if isinstance(layer, bn.BatchNorm1d):
            layers.register_module(name, norm(layer.num_features))
    return layers


def training(part: str, setting: str, size: int, seed: int, epochs: int) -> float:
    """The error on held-out images after one training."""
    data, noise = digits.load(), 1.5 if setting == "noise" else 0.0
    held_out = Examples(
        torch.cat([data.validation.images, data.test.images]), torch.cat([data.validation.labels, data.test.labels])
    )
    drawn = torch.Generator().manual_seed(99)
    held_out = replace(held_out, images=held_out.images + noise * torch.randn(held_out.images.shape, generator=drawn))
    steps = epochs * (len(data.train) // BATCH)
    torch.manual_seed(seed)
    model = network(lambda channels: PARTS[part](channels, size, steps))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    drawn = torch.Generator().manual_seed(seed)
    for _, index in zip(range(steps), batches(len(data.train), BATCH, seed), strict=False):
        batch = data.train[index]
        if setting == "sorted":
            batch = batch[batch.labels.argsort(stable=True)]
        images = batch.images + noise * torch.randn(batch.images.shape, generator=drawn) if noise else batch.images
        optimizer.zero_grad()
        F.cross_entropy(model(images), batch.labels).backward()
        optimizer.step()
        schedule.step()
    return 1 - accuracy(model, held_out)


def sweep(
    parts: Sequence[str], sizes: Sequence[int], seeds: int, epochs: int, workers: int, report: Callable[[str], None]
) -> list[Row]:
    """Every setting, part and normalization batch; plain and 64 must come first. Results do not depend on the number of workers."""
    cells = [
        (part, setting, size)
        for setting, smallest, _ in PROMISES
        for part in parts
        for size in sizes
        if size >= smallest and (part != "group norm" or size == BATCH)  # which knows no batch
    ]
    rows = list[Row]()
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        running = [[pool.submit(training, *cell, seed, epochs) for seed in range(seeds)] for cell in cells]
        for (part, setting, size), trainings in zip(cells, running, strict=True):
            errors = [training.result() for training in trainings]
            deviation = statistics.stdev(errors) if seeds > 1 else 0.0
            row = _with_recovered(Row(setting, part, size, seeds, statistics.fmean(errors), deviation), rows)
            rows.append(row)
            back = "" if row.recovered is None else f"  {row.recovered:5.0%} back"
            report(f"{setting:7} {part:15} {size:3}  {100 * row.error:5.1f} ± {100 * deviation:.1f} %{back}")
    return rows


def _with_recovered(row: Row, rows: Sequence[Row]) -> Row:
    errors = {
        other.normalization_batch: other.error
        for other in rows
        if (other.setting, other.part) == (row.setting, "plain")
    }
    small, large = errors.get(row.normalization_batch), errors.get(BATCH)
    if row.part == "plain" or small is None or large is None or small <= large:
        return row
    return replace(row, recovered=(small - row.error) / (small - large))


def kept(rows: Sequence[Row]) -> list[tuple[str, Row, bool]]:
    """For each promise: what was promised, the best part there, and whether it holds."""
    found = list[tuple[str, Row, bool]]()
    for setting, size, share in PROMISES:
        there = [row for row in rows if (row.setting, row.normalization_batch) == (setting, size)]
        best = max((row for row in there if row.recovered is not None), key=lambda row: row.recovered or 0.0)
        found.append((f"{setting}, {size}: at least {share:.0%}", best, (best.recovered or 0.0) >= share))
    return found


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [
            Row(
                line["setting"],
                line["part"],
                int(line["normalization_batch"]),
                int(line["seeds"]),
                float(line["error"]),
                float(line["deviation"]),
                float(line["recovered"]) if line["recovered"] else None,
            )
            for line in csv.DictReader(file)
        ]


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
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="plain is the first")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 16, 8, 4, 2], help="64 is the first")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="where the rows go")
    arguments = parser.parse_args()
    rows = sweep(
        arguments.parts,
        arguments.sizes,
        arguments.seeds,
        arguments.epochs,
        arguments.workers,
        partial(print, flush=True),
    )
    write(arguments.csv, rows)
    for promise, best, holds in kept(rows):
        print(f"{promise}: {best.part} recovers {best.recovered:.0%}, {'kept' if holds else 'NOT kept'}")


if __name__ == "__main__":
    main()
