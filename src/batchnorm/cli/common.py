"""Shared by the commands: console, checks of output files, progress bar."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich import console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from batchnorm.cli.text import visible
from batchnorm.errors import InputError
from batchnorm.files import check_file
from batchnorm.language import text_width

force_option = click.option("--force", "-f", is_flag=True, help="Overwrite files that exist.")


class Console(console.Console):
    """A console that prints strings literally: no markup, no emoji, no escape sequences. Styled text is a `rich.text.Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render_str(self, text: str, *, style: Any = "", **options: Any) -> Text:
        """The literal text. Rich calls this for every string that is printed, also in tables and trees.

        Chinese has no spaces, so it is broken anywhere instead of cut.
        """
        shown = visible(text, keep="\n")
        overflow = "fold" if text_width(shown) > len(shown) else options.get("overflow")
        return Text(shown, style=style, justify=options.get("justify"), overflow=overflow)


def check_outputs(outputs: Mapping[str, Path | None], *, force: bool) -> None:
    """Check, before the work, that a command can write its output files.

    Raises:
        InputError: two options name one file; a file exists and `force` is not given; or as `check_file`.
    """
    files = {option: path for option, path in outputs.items() if path is not None}
    taken = dict[Path, str]()
    for option, path in files.items():
        if path.is_dir():  # the empty name is a folder too
            raise InputError(f"{option} must be a file, but {path} is a folder")
        exists = check_file(path)
        if exists and not force:
            raise InputError(
                f"{option} must not exist yet, but {path} does; choose another name, or overwrite it with --force"
            )
        other = taken.setdefault(path.resolve(), option)
        if other != option and (exists or not path.exists()):  # a device may be written twice
            raise InputError(f"{other} and {option} must be different files, but both are {path}")


def command_line(ctx: click.Context) -> str:
    """The command line, with full names of commands and options."""
    path, parent = list[str](), ctx
    while parent.parent is not None:  # the root command has several names
        path.insert(0, str(parent.info_name))
        parent = parent.parent
    words = ["batchnorm", *path]
    for option in ctx.command.params:
        if option.name in ctx.params and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            value = ctx.params[option.name]
            listed = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            if isinstance(option, click.Argument):
                words += value
            else:
                words += [option.opts[0]] if value is True else [option.opts[0], listed]
    return shlex.join(words)


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A progress bar on stderr, if that is a terminal, followed by `columns`: by default the finished items and the time left."""
    stderr = Console(stderr=True)
    last = columns or (MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
    begin = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    return Progress(*begin, *last, console=stderr, transient=True, disable=not stderr.is_terminal)
