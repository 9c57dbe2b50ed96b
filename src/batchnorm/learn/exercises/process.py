"""Checks files of learners in a process of their own, which is ended when it takes too long."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from batchnorm.language import Language, speaking, spoken, tr
from batchnorm.learn.exercises.check import Result, judged, loaded
from batchnorm.learn.exercises.learner import Wrong
from batchnorm.learn.exercises.tasks import TASKS

SECONDS = 10  # of a task; the checks of a solution take a hundredth
LOADED = "loaded"  # sent when a file has run
START = 300  # of the process, which imports torch


class Job(NamedTuple):
    """A task to check on a file."""

    path: Path
    number: int


def tasks_of(path: Path) -> list[int]:
    """The tasks that a file is about: that of its name, such as 02_forward.py, and those whose names it defines.

    A file that is no Python is about the task of its name alone.
    """
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        body = []
    defined = {name for statement in body for name in _names(statement)}
    named = path.name[:2]
    return [
        number
        for number, task in TASKS.items()
        if named == f"{number:02d}" or any(name in defined for name in task.defines)
    ]


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return []


def results(jobs: Sequence[Job], seconds: float = SECONDS) -> Iterator[Result]:
    """The result of each job, as they come. What does not end within `seconds` is wrong."""
    waiting = list(jobs)
    while waiting:
        ours, theirs = get_context("spawn").Pipe()
        process = get_context("spawn").Process(target=_work, args=(theirs, waiting, spoken()), daemon=True)
        process.start()
        theirs.close()
        try:
            _received(ours, START)
            while waiting:
                job = waiting.pop(0)
                loaded_it = (told := _received(ours, seconds)) == LOADED
                told = _received(ours, seconds) if loaded_it else told
                yield told if isinstance(told, Result) else Result(job.number, "wrong", told)
                if isinstance(told, Result):
                    continue
                if not loaded_it:  # the file itself does not end, so none of its tasks can be checked
                    yield from (Result(number, "wrong", told) for path, number in waiting if path == job.path)
                    waiting = [each for each in waiting if each.path != job.path]
                break
        finally:
            process.kill()
            process.join()
            ours.close()


def _received(connection: Connection, seconds: float) -> Result | str:
    """What the process sends, or why it does not."""
    if not connection.poll(seconds):
        return tr(
            "your code runs for more than {seconds} s: is there a loop that does not end?", seconds=f"{seconds:g}"
        )
    try:
        return connection.recv()
    except EOFError:
        return tr("your code ended the process of the check")


def _work(connection: Connection, jobs: Sequence[Job], language: Language) -> None:
    """Send a greeting, and the result of each job. What the learner's code writes or reads past Python goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it stays open for the learner's code
    connection.send("ready")
    with speaking(language):
        for job in jobs:
            try:
                namespace = loaded(job.path)
                connection.send(LOADED)
                result = judged(TASKS[job.number], namespace)
            except Wrong as wrong:
                result = Result(job.number, "wrong", str(wrong))
            except SystemExit:
                result = Result(job.number, "wrong", tr("the file ends Python: leave out exit()"))
            connection.send(result)
