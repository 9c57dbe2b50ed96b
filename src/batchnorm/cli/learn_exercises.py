"""`batchnorm learn start` and `batchnorm learn check`. What they do is imported when they run, since it needs torch."""

from __future__ import annotations

from pathlib import Path

import click

from batchnorm.cli.common import force_option
from batchnorm.cli.language import lang_option
from batchnorm.language import tr

TASKS = 10


@click.command("start", epilog="Example: batchnorm learn start exercises")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("exercises"), metavar="[DIR]")
@lang_option
@force_option
def start_command(folder: Path, force: bool) -> None:
    """Write a file for each of the ten tasks into DIR, by default `exercises`: what to do, and the code to begin with."""
    from batchnorm.cli.exercises import start

    start(folder, force)


@click.command("check", epilog="Example: batchnorm learn check exercises/02_forward.py --hint")
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--task", type=click.IntRange(1, TASKS), metavar="N", help="Check this task alone.")
@click.option(
    "--hint",
    "hints",
    count=True,
    help="Give a hint for the first task that is not right; again for more: --hint --hint.",
)
@lang_option
@click.pass_context
def check_command(ctx: click.Context, path: Path, task: int | None, hints: int) -> None:
    """Check the tasks that FILE solves, or all files of a folder, and name what is misunderstood.

    The code runs in a process of its own, on random inputs, against float64. Exit code 0: every task is right; 1: not every.
    """
    from batchnorm.cli.exercises import check

    if not check(path, task, hints):
        ctx.exit(1)
    click.echo(tr("Everything is right."))
