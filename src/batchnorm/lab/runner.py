"""Measures units in worker processes, and stores what they return, so that no unit is measured twice.

Each result is stored at once, under a key of its arguments and of the code that it depends on. So an interrupted run continues where it
stopped, and a change of arguments or code gives a new run. Workers compute with one thread each, so results do not depend on their number.
If the system supports it, workers are forked from a server process that has imported torch and the experiments; the server computes
nothing, so no thread is lost in the fork.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import torch

from batchnorm.errors import BatchNormError, StateError
from batchnorm.files import check_writable, read_json, to_json, write
from batchnorm.lab import experiments
from batchnorm.lab.unit import Finished, Unit

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

Measure = Callable[[Unit], Finished]


def stored(unit: Unit, directory: Path) -> Finished | None:
    """The result that `run` stored in `directory` for this unit; None if there is none, or if it is damaged."""
    try:
        return unit.unpack(read_json(directory / unit.file_name))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def all_stored(units: Sequence[Unit], directory: Path) -> list[Finished]:
    """The results that `run` stored in `directory`, in the order of the units."""
    return [result for unit in units if (result := stored(unit, directory)) is not None]


def run(measure: Measure, units: Sequence[Unit], directory: Path, workers: int) -> Generator[Finished, None, None]:
    """Yield the results of all units: first those stored in `directory`, then the others as they finish and are stored.

    Args:
        measure: a module-level function, called in the workers.
        units: the units, in the order in which they start.
        directory: where results are stored; created if needed.
        workers: number of processes.

    Raises:
        InputError: `directory` cannot be written.
        BatchNormError: if `measure` raised it.
        StateError: a worker died, for instance because memory ran out.
    """
    check_writable(directory)
    found = [(unit, stored(unit, directory)) for unit in units]
    yield from (result for _, result in found if result is not None)
    waiting = [unit for unit, result in found if result is None]
    with _pool(measure, {unit.experiment for unit in waiting}, min(workers, len(waiting))) as pool:
        idle, busy = list(pool), dict[Connection, Unit]()
        while waiting or busy:
            while waiting and idle:
                connection = idle.pop()
                busy[connection] = waiting.pop(0)
                connection.send(busy[connection])
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                unit = busy.pop(connection)
                result = _receive(connection, pool[connection], unit)
                write(directory / unit.file_name, to_json(unit.pack(result)))
                idle.append(connection)
                yield result


def _receive(connection: Connection, process: BaseProcess, unit: Unit) -> Finished:
    try:
        answer = connection.recv()
    except EOFError as error:
        process.join()
        raise StateError(
            f"a worker must finish its measurement; the one of {unit.file_name} ended with exit code {process.exitcode}: "
            "run again, with fewer --workers if memory is short"
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def prepare(names: Iterable[str]) -> None:
    """Start the server process of the workers, which imports the experiments with these names, and return at once."""
    context = _context(names)
    if context.get_start_method() == "forkserver":
        from multiprocessing.forkserver import ensure_running

        with _interrupts_ignored():
            ensure_running()


def _context(names: Iterable[str]) -> SpawnContext | ForkServerContext:
    if "forkserver" not in get_all_start_methods():  # Windows
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([Unit.__module__, *map(experiments.module_of, names)])
    return context


@contextmanager
def _pool(measure: Measure, names: Iterable[str], size: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Worker processes by their connection; at the end of the context they are terminated."""
    context = _context(names)
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


def _work(measure: Measure, connection: Connection) -> None:
    """Measure units until the parent closes the connection or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            unit = connection.recv()
            try:
                answer = measure(unit)
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
