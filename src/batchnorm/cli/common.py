"""What the commands share."""

from __future__ import annotations

import shlex

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


def command_line(ctx: click.Context) -> str:
    """What was typed, spelled out."""
    words = ["batchnorm", str(ctx.info_name)]
    for option in ctx.command.params:
        if option.name and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            value = ctx.params[option.name]
            listed = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [option.opts[0]] if value is True else [option.opts[0], listed]
    return shlex.join(words)


def progress_bar() -> Progress:
    """A line with an estimate, while stderr is a terminal."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
