"""Measures the effect of huge pages: time of a clone of 100 MB in processes that differ in one environment variable."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from batchnorm.bench.row import circumstances
from batchnorm.env import ADVICE, huge_pages
from batchnorm.errors import StateError
from batchnorm.measure import digits, percentile

PROGRAM = """
import time, torch
torch.set_num_threads(1)
x = torch.randn({numel})
for _ in range({clones} + 1):
    start = time.thread_time()
    y = x.clone()
    print(time.thread_time() - start)
    del y
"""
NUMEL = 32 * 64 * 112 * 112  # the largest activation of ResNet-50 at batch 32, 103 MB of float32


@dataclass(frozen=True)
class Clone:
    """Milliseconds of processor time of a clone on one thread into new memory, without and with huge pages, and the machine.

    Attributes:
        faster: the speedup with huge pages.
    """

    bytes: int
    huge_pages: str
    without_ms: list[float]
    with_ms: list[float]
    faster: float
    circumstances: dict[str, Any]

    def to_dict(self) -> dict[str, object]:
        """The measurement as plain data for JSON; times as p20, p50, p80."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"clone of {self.bytes / 1e6:.0f} MB: {self.without_ms[1]:.0f} ms, with {ADVICE}=1 {self.with_ms[1]:.0f} ms, "
            f"{self.faster:.1f} times faster"
        )


def measure_clone(numel: int = NUMEL, processes: int = 5, clones: int = 5) -> Clone:
    """Measure both settings alternately, with several processes for each.

    Raises:
        StateError: a process failed.
    """
    samples: dict[str, list[float]] = {"0": [], "1": []}
    for _ in range(processes):
        for setting, seconds in samples.items():
            seconds += _clones(setting, numel, clones)
    without, asked = ([1e3 * percentile(samples[kind], p) for p in (20, 50, 80)] for kind in ("0", "1"))
    return Clone(
        bytes=4 * numel,
        huge_pages=huge_pages(),
        without_ms=[digits(value) for value in without],
        with_ms=[digits(value) for value in asked],
        faster=digits(without[1] / asked[1]),
        circumstances=circumstances(),
    )


def _clones(setting: str, numel: int, clones: int) -> list[float]:
    """Seconds of each clone of one process, except the first."""
    program = PROGRAM.format(numel=numel, clones=clones)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, ADVICE: setting},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise StateError(f"a process must be able to clone {4 * numel} bytes, but: {done.stderr.strip()[-200:]}")
    return [float(line) for line in done.stdout.split()][1:]
