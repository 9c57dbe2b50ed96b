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

START = 120.0  # seconds a busy machine may take to bring all processes up
_server = mp.get_context("forkserver")  # loads torch once, not for each process
_server.set_forkserver_preload(["torch", "torch.distributed", "batchnorm"])


def _replica(rank: int, size: int, folder: str, check: Callable[[int, int], None]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=START))
    try:
        check(rank, size)
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # without waiting for replicas that may be dead


def impatient(seconds: float) -> dist.ProcessGroup:
    """A group of all ranks, which are up by now, that waits no longer than that."""
    dist.barrier()
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    assert isinstance(group, dist.ProcessGroup)
    return group


def on_replicas(check: Callable[[int, int], None], size: int, *, killed: tuple[int, ...] = ()) -> None:
    """Run `check(rank, size)` in so many processes; those in `killed` are expected to die by a signal, the others to succeed."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [_server.Process(target=_replica, args=(rank, size, folder, check)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(START)
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hanging:
            processes[rank].kill()
        said = "\n".join(f"rank {path.stem}: {path.read_text()}" for path in sorted(Path(folder).glob("*.txt")))
        assert not hanging, f"ranks {hanging} hang\n{said}"
        for rank, process in enumerate(processes):
            code = process.exitcode
            assert code is not None
            assert (code < 0) if rank in killed else (code == 0), f"rank {rank} ended with {code}\n{said}"
