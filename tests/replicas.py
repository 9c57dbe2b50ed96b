"""Replicas on loopback with gloo: every process runs the same function, many checks per spawn."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 20.0  # seconds of the process group


def _replica(rank: int, size: int, folder: str, check: Callable[[int, int], None], timeout: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
    )
    try:
        check(rank, size)
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # without waiting for replicas that may be dead


def on_replicas(
    check: Callable[[int, int], None], size: int, *, timeout: float = TIMEOUT, killed: tuple[int, ...] = ()
) -> None:
    """Run `check(rank, size)` in so many processes; those in `killed` are expected to die by a signal, the others to succeed."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [
            context.Process(target=_replica, args=(rank, size, folder, check, timeout)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(6 * timeout)
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hanging:
            processes[rank].kill()
        said = "\n".join(f"rank {path.stem}: {path.read_text()}" for path in sorted(Path(folder).glob("*.txt")))
        assert not hanging, f"ranks {hanging} hang\n{said}"
        for rank, process in enumerate(processes):
            code = process.exitcode
            assert code is not None
            assert (code < 0) if rank in killed else (code == 0), f"rank {rank} ended with {code}\n{said}"
