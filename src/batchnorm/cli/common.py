"""What the commands share."""

from __future__ import annotations

import shlex

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


def command_line(ctx: click.Context) -> str:
    """What was typed, spelled out."""
    path, parent = list[str](), ctx
    while parent.parent is not None:  # the root goes by several names
        path.insert(0, str(parent.info_name))
        parent = parent.parent
    words = ["batchnorm", *path]
    for option in ctx.command.params:
        if option.name and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            value = ctx.params[option.name]
            listed = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            if isinstance(option, click.Argument):
                words += value
            else:
                words += [option.opts[0]] if value is True else [option.opts[0], listed]
    return shlex.join(words)


def progress_bar(counted: bool = True) -> Progress:
    """A line with an estimate, while stderr is a terminal; with how many are done unless they do not count alike."""
    console = Console(stderr=True)
    count = (MofNCompleteColumn(),) if counted else ()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        *count,
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
