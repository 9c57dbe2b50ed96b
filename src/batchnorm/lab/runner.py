"""Runs many independent jobs in worker processes, and stores their results, so that no job runs twice.

Each result is stored at once, under a key of its arguments and of the code that it depends on. So an interrupted run continues where it
stopped, and a change of arguments or code gives a new run. Workers compute with one thread each, so results do not depend on their number.
If the system supports it, workers are forked from a server process that has imported torch and the experiment; the server computes
nothing, so no thread is lost in the fork.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from batchnorm.errors import BatchNormError, StateError
from batchnorm.files import check_writable, read_json, to_json, write

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

R = TypeVar("R")


class Job(Protocol[R]):
    """The arguments of a job, and how its result is stored."""

    @property
    def file_name(self) -> str:
        """A name that is unique for arguments, data and code."""
        ...

    def pack(self, result: R, /) -> Any:
        """The result as plain data for JSON."""
        ...

    def unpack(self, data: Any, /) -> R:
        """The inverse of `pack`; raises ValueError, TypeError, KeyError or AttributeError on other data."""
        ...


J = TypeVar("J", bound=Job[Any])


def stored(job: Job[R], directory: Path) -> R | None:
    """The result that `run` stored in `directory` for this job; None if there is none, or if it is damaged."""
    try:
        return job.unpack(read_json(directory / job.file_name))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def all_stored(jobs: Sequence[Job[R]], directory: Path) -> list[R]:
    """The results that `run` stored in `directory`, in the order of the jobs."""
    return [result for job in jobs if (result := stored(job, directory)) is not None]


def run(measure: Callable[[J], R], jobs: Sequence[J], directory: Path, workers: int) -> Generator[R, None, None]:
    """Yield the results of all jobs: first those stored in `directory`, then the others as they finish and are stored.

    Args:
        measure: a module-level function, called in the workers.
        jobs: the jobs, in the order in which they start.
        directory: where results are stored; created if needed.
        workers: number of processes.

    Raises:
        InputError: `directory` cannot be written.
        BatchNormError: if `measure` raised it.
        StateError: a worker died, for instance because memory ran out.
    """
    check_writable(directory)
    found = [(job, stored(job, directory)) for job in jobs]
    yield from (result for _, result in found if result is not None)
    waiting = [job for job, result in found if result is None]
    with _pool(measure, min(workers, len(waiting))) as pool:
        idle, busy = list(pool), dict[Connection, J]()
        while waiting or busy:
            while waiting and idle:
                connection = idle.pop()
                busy[connection] = waiting.pop(0)
                connection.send(busy[connection])
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                job = busy.pop(connection)
                result = _receive(connection, pool[connection], job)
                write(directory / job.file_name, to_json(job.pack(result)))
                idle.append(connection)
                yield result


def _receive(connection: Connection, process: BaseProcess, job: Job[R]) -> R:
    try:
        answer = connection.recv()
    except EOFError as error:
        process.join()
        raise StateError(
            f"a worker must finish its training; the one of {job.file_name} ended with exit code {process.exitcode}: "
            "run again, with fewer --workers if memory is short"
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def prepare(measure: Callable[[Any], Any]) -> None:
    """Start the server process of the workers, which imports what `measure` needs, and return at once."""
    context = _context(measure)
    if context.get_start_method() == "forkserver":
        from multiprocessing.forkserver import ensure_running

        with _interrupts_ignored():
            ensure_running()


def _context(measure: Callable[[Any], Any]) -> SpawnContext | ForkServerContext:
    if "forkserver" not in get_all_start_methods():  # Windows
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([measure.__module__])
    return context


@contextmanager
def _pool(measure: Callable[[Any], Any], size: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Worker processes by their connection; at the end of the context they are terminated."""
    context = _context(measure)
    pool: dict[Connection, BaseProcess] = {}
    try:
        with _interrupts_ignored():
            for _ in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(measure, theirs), daemon=True)
                process.start()
                theirs.close()
                pool[ours] = process
        yield pool
    finally:
        for process in pool.values():
            process.terminate()
        for connection, process in pool.items():
            process.join()
            connection.close()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Make processes that start in this context ignore Ctrl-C, which a terminal sends to them too; the parent ends them."""
    try:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread; only that one is interrupted by Ctrl-C
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _work(measure: Callable[[Any], Any], connection: Connection) -> None:
    """Run jobs until the parent closes the connection or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
            try:
                answer = measure(job)
            except BatchNormError as error:  # about the data, for example; the parent raises it
                answer = error
            connection.send(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _end_with_parent() -> None:
    """End this worker when its parent ends; a killed parent cannot do it."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
