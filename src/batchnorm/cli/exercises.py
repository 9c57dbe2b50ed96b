"""What `batchnorm learn start` and `batchnorm learn check` do: files to begin with, and a table of results."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from batchnorm.cli.common import Console, check_outputs
from batchnorm.errors import InputError
from batchnorm.files import write
from batchnorm.language import tr
from batchnorm.learn.exercises.check import STATES, Result
from batchnorm.learn.exercises.process import Job, results, tasks_of
from batchnorm.learn.exercises.tasks import TASKS

STYLES = {"ok": "green", "not done yet": "dim", "wrong": "red"}
MOST_LINES = 5  # of what the learner's code printed


def start(folder: Path, force: bool) -> None:
    """Write the file of each task into a folder."""
    files = {task.file_name: folder / task.file_name for task in TASKS.values()}
    check_outputs(files, force=force)
    for task in TASKS.values():
        write(files[task.file_name], task.file())
    begin = next(iter(files))
    click.echo(tr("Wrote {count} files into {folder}.", count=len(files), folder=folder))
    click.echo(tr("Begin with {file}, and check it with: batchnorm learn check {folder}", file=begin, folder=folder))


def check(path: Path, task: int | None, hints: int) -> bool:
    """Check a file or a folder, print what was found, and say whether everything is right."""
    jobs = _jobs(path, task)
    found = {job.number: result for job, result in zip(jobs, results(jobs), strict=True)}
    _show(found)
    left = [job for job in jobs if found[job.number].state != "ok"]
    if left:
        _show_next(left[0], hints)
    return not left


def _jobs(path: Path, task: int | None) -> list[Job]:
    """What to check. A folder has a file for each task.

    Raises:
        InputError: there is no such file, or it has no task.
    """
    if path.is_dir():
        jobs = [Job(file, number) for number, each in TASKS.items() if (file := path / each.file_name).is_file()]
        if not jobs:
            raise InputError(
                f"FILE must be a file or a folder of exercises, but {path} has none; write them with: batchnorm learn start"
            )
        jobs = [job for job in jobs if task in (None, job.number)]
        if not jobs:
            raise InputError(f"FILE must have the task of --task, but {path} has no {TASKS[task or 1].file_name}")
        return jobs
    try:
        numbers = tasks_of(path) if task is None else [task]
        path.read_bytes()
    except OSError as error:
        raise InputError(f"FILE must be a file that can be read, but {path} is not: {error.strerror}") from error
    if not numbers:
        raise InputError(
            f"FILE must define what a task asks for, such as forward, but {path} does not; say which it is with --task"
        )
    return [Job(path, number) for number in numbers]


def _show(found: dict[int, Result]) -> None:
    """A row for each task, and what the learner's code printed."""
    table = Table("", tr("task"), tr("result"), box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, result in sorted(found.items()):
        said = Text(result.in_words())
        said.stylize(STYLES[result.state], 0, len(tr(STATES[result.state])))
        table.add_row(str(number), tr(TASKS[number].title), said)
    console = Console()
    console.print(table)
    for number, result in sorted(found.items()):
        if result.printed.strip():
            lines = result.printed.splitlines()
            more = ["..."] if len(lines) > MOST_LINES else []
            console.print("\n" + tr("Your code of task {number} prints:", number=number))
            console.print("\n".join(f"  {line}" for line in (*lines[:MOST_LINES], *more)))
    console.print()


def _show_next(job: Job, hints: int) -> None:
    """The hints that were asked for, or how to get one."""
    given = TASKS[job.number].hints
    for place, hint in enumerate(given[:hints], 1):
        click.echo(
            tr(
                "Hint {place} of {count} for task {number}: {hint}",
                place=place,
                count=len(given),
                number=job.number,
                hint=tr(hint),
            )
        )
    if hints < len(given):
        command = f"batchnorm learn check {shlex.quote(str(job.path))} --task {job.number}{' --hint' * (hints + 1)}"
        go_on = tr("For the next hint: {command}", command=command)
        if not hints:
            go_on = tr("Go on with task {number}. For a hint: {command}", number=job.number, command=command)
        click.echo(go_on)
