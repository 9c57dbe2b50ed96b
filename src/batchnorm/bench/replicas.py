"""Measures the cost of synchronization: layers in several processes on loopback with gloo, torch's and ours alone, and ours synchronized.

A synchronized call waits for the other processes, so all make the same calls in the same order, and agree on their number before the clock
starts. A barrier precedes each sample. Times are wall-clock times of the first process.
"""

from __future__ import annotations

import datetime
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from batchnorm.bench import memory
from batchnorm.bench.case import Case, Tensors, tensors
from batchnorm.bench.providers import Copy, Eager, Ours, Timed, layer_of_ours, timed_layer
from batchnorm.bench.row import Row
from batchnorm.bench.run import rows, settled
from batchnorm.distributed import synchronize
from batchnorm.measure import SAMPLE

RANKS = 2
MOST_ROUNDS = 200
TIMEOUT = datetime.timedelta(minutes=5)


class Synchronized:
    """Our layer over the replicas of the default process group."""

    name = "synchronized"

    def refuses(self, case: Case) -> str | None:  # noqa: ARG002 (the protocol's signature)
        return None if dist.is_initialized() else "it needs several processes"

    def prepare(self, case: Case, given: Tensors) -> Timed:
        layer = layer_of_ours(case, given)
        synchronize(layer)
        return timed_layer(case, given, layer)


def run(cases: Sequence[Case], seconds: float, least: int = 5, ranks: int = RANKS) -> Iterator[list[Row]]:
    """Measure each case in new processes and yield its rows; about `seconds` for all, but at least `least` rounds each.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what a process raised.
    """
    if not cases:
        return
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, list(cases), seconds / len(cases), least, results)
        processes = mp.start_processes(_replica, arguments, nprocs=ranks, join=False, start_method="spawn")
        assert processes is not None
        try:
            for case in cases:
                while results.empty():
                    processes.join(timeout=0.1)
                yield _rows(case, results.get(), ranks)
            while not processes.join(timeout=1.0):
                pass
        finally:
            for process in processes.processes:
                if process is not None and process.is_alive():
                    process.terminate()


def _rows(case: Case, samples: dict[str, list[float]], ranks: int) -> list[Row]:
    nothing = dict.fromkeys(samples)
    return [
        replace(row, metric="time per call, the other replicas' included", ranks=ranks)
        for row in rows(case, samples, nothing, nothing)
    ]


def _replica(rank: int, ranks: int, folder: str, cases: list[Case], seconds: float, least: int, results: Any) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of a host need not resolve
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=TIMEOUT)
    for number, case in enumerate(cases):
        given = tensors(case, seed=ranks * number + rank)
        alone = replace(case, through="layer")
        with settled(case.threads), memory.outputs(case.outputs), torch.set_grad_enabled(case.needs_grad):
            timed = {one.name: one.prepare(alone, given) for one in (Copy(), Eager(), Ours(), Synchronized())}
            samples = _in_step(timed, seconds, least)
        if rank == 0:
            results.put(samples)
    dist.barrier()
    dist.destroy_process_group()


def _in_step(timed: dict[str, Timed], seconds: float, least: int) -> dict[str, list[float]]:
    """As `measure.interleaved`, but every process takes the same number of samples, of the same number of calls."""
    once = torch.tensor([min(_sample(function, 1) for _ in range(3)) for function in timed.values()])
    dist.all_reduce(once, op=dist.ReduceOp.MAX)
    repeats = [max(1, math.ceil(SAMPLE / max(cost, 1e-9))) for cost in once.tolist()]
    round_costs = sum(cost * number for cost, number in zip(once.tolist(), repeats, strict=True))
    rounds = min(max(least, int(seconds / round_costs)), MOST_ROUNDS)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    order, shuffle = list(zip(timed, repeats, strict=True)), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name, number in order:
            samples[name].append(_sample(timed[name], number))
    return samples


def _sample(function: Timed, repeats: int) -> float:
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats
