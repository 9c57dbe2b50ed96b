"""What `bn.diagnostics.Monitor` costs: its look, spread over the steps from one look to the next, and its counting in every step.

    python benchmarks/monitor_cost.py    # two minutes on one core; prints the table, writes the rows

A step is forward, backward and SGD. Plain steps and steps with a look take turns, so that a slow minute hits both; times are medians of the
process's own time. share = (look - step + every * count) / (every * step).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch
from torch import nn

import rows
from batchnorm import env
from batchnorm.bench.networks import NETWORKS
from batchnorm.diagnostics import Monitor

RESULTS = Path(__file__).parent / "results" / "monitor.csv"
EVERY = 100
ROUNDS = 15


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        network: of `batchnorm bench --model`.
        batch: samples.
        compiled: whether the model went through torch.compile.
        norms: batch norms.
        step_ms: a step without a monitor.
        look_ms: a step with a look, its evaluation included.
        count_us: counting a step.
        share: of the time of all steps, with a look every 100 steps.
        machine: processor.
        torch: version.
        date: of the measurement.
    """

    network: str
    batch: int
    compiled: bool
    norms: int
    step_ms: float
    look_ms: float
    count_us: float
    share: float
    machine: str
    torch: str
    date: str


def seconds(step) -> float:  # noqa: ANN001 (a function without arguments)
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(name: str, batch: int, rounds: int, *, compiled: bool) -> Row:
    """Measure a network."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.build()
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(batch, *network.sample)

    def step() -> None:
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    plain, looks = list[float](), list[float]()
    for _ in range(rounds):
        plain.append(seconds(step))
        monitor = Monitor(model, every=1).start()
        looks.append(seconds(step))
        monitor.close()
    with Monitor(model, every=10**9) as monitor:
        counting = seconds(lambda: [monitor._stepped(optimizer) for _ in range(10_000)]) / 10_000
    once, look = median(plain), median(looks)
    share = (look - once + EVERY * counting) / (EVERY * once)
    machine = env.machine().cpu
    today = datetime.now(UTC).date().isoformat()
    times = (1e3 * once, 1e3 * look, 1e6 * counting, share)
    return Row(name, batch, compiled, norms, *times, machine, torch.__version__, today)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each network")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="rows to write")
    parser.add_argument("networks", nargs="*", default=["mlp", "resnet18", "mobilenet"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [
        measure(name, NETWORKS[name].batch[0], arguments.rounds, compiled=compiled)
        for name in arguments.networks
        for compiled in (False, True)
    ]
    rows.write(arguments.csv, found)
    for row in found:
        kind = "compiled" if row.compiled else "eager"
        print(
            f"{row.network:<10} {kind:<8} {row.norms:>3} norms  step {row.step_ms:8.2f} ms  look {row.look_ms:8.2f} ms  "
            f"count {row.count_us:.2f} µs  {row.share:.2%} of the time at every={EVERY}"
        )


if __name__ == "__main__":
    main()
