"""Runs many independent trainings over worker processes, and never the same one twice.

Each finished training is stored at once under a key made of its arguments and of the library's code, so an interrupted
run goes on where it stopped, and a change of either starts afresh. Workers compute with one thread each: results do not
depend on how many there are.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from batchnorm.errors import InputError, StateError
from batchnorm.lab.result import Training, check_writable, to_json, write


@dataclass(frozen=True)
class Job:
    """One training's arguments: everything that its result depends on, besides the code."""

    experiment: str
    arm: str
    learning_rate: float
    seed: int
    steps: int
    batch_size: int
    measure_every: int
    data: str | None
    fingerprint: str

    @property
    def file_name(self) -> str:
        """Readable, and different for different arguments or code; where the data lie does not matter, the fingerprint does."""
        arguments = asdict(self) | {"data": None}
        key = hashlib.sha256(json.dumps([arguments, code_version()], sort_keys=True).encode()).hexdigest()
        return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}-{key[:12]}.json"


@cache
def code_version() -> str:
    """A digest of torch's version and of every source and library of this package that a training can run."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(package.rglob("*")):
        inside = path.relative_to(package)
        if path.suffix in {".py", ".so"} and inside.parts[0] not in {"bench", "cli", "env.py", "report", "__main__.py"}:
            digest.update(str(inside).encode() + path.read_bytes())
    return digest.hexdigest()


Measure = Callable[[Job], Training]


def stored(job: Job, directory: Path) -> Training | None:
    """The training that `run` left in `directory` for this job, if any."""
    try:
        return Training(**json.loads((directory / job.file_name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def run(measure: Measure, jobs: Sequence[Job], directory: Path, workers: int) -> Generator[Training, None, None]:
    """Yield every job's training: first those stored in `directory`, then the others as they finish, stored before.

    Args:
        measure: a module-level function, called in the workers.
        jobs: in the order in which they are begun.
        directory: where trainings are stored; made if needed.
        workers: how many processes.

    Raises:
        InputError: `directory` cannot be written.
        StateError: a worker died, for instance for want of memory.
    """
    check_writable(directory)
    found = [(job, stored(job, directory)) for job in jobs]
    yield from (training for _, training in found if training is not None)
    waiting = [job for job, training in found if training is None]
    with _pool(measure, min(workers, len(waiting))) as pool:
        idle, busy = list(pool), {}
        while waiting or busy:
            while waiting and idle:
                connection = idle.pop()
                busy[connection] = waiting.pop(0)
                connection.send(busy[connection])
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                job = busy.pop(connection)
                training = _receive(connection, pool[connection], job)
                write(directory / job.file_name, to_json(asdict(training)))
                idle.append(connection)
                yield training


def _receive(connection: Connection, process: BaseProcess, job: Job) -> Training:
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


@contextmanager
def _pool(measure: Measure, size: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Worker processes by their connection; ended on leaving, whatever they do."""
    context = get_context("spawn")
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
    """Children started here inherit deafness to Ctrl-C, which a terminal sends to them too; the parent ends them."""
    try:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, which is the only one that Ctrl-C interrupts
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _work(measure: Measure, connection: Connection) -> None:
    """Answer jobs until the parent closes the line, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
            try:
                answer = measure(job)
            except InputError as error:  # the data changed under us: the parent says so
                answer = error
            connection.send(answer)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
