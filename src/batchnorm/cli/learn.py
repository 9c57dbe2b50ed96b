"""`batchnorm learn`: the interactive page. It starts at once, since it does not import torch."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from batchnorm.cli.common import check_outputs, force_option
from batchnorm.cli.language import lang_option
from batchnorm.cli.learn_exercises import check_command, start_command
from batchnorm.files import write
from batchnorm.language import spoken, tr
from batchnorm.learn.page import panels, render

DEFAULT = Path("runs/learn/learn.html")


@click.group(
    "learn", invoke_without_command=True, epilog="Example: batchnorm learn --lang zh --panel modes --out bn.html"
)
@lang_option
@click.option("--panel", type=click.Choice(panels()), help="Panel to open at.  [default: the beginning]")
@click.option("--out", type=click.Path(path_type=Path), help=f"File to write.  [default: {DEFAULT.as_posix()}]")
@click.option("--no-open", is_flag=True, help="Write the file only, and do not open it in the browser.")
@force_option
@click.pass_context
def learn_command(ctx: click.Context, panel: str | None, out: Path | None, no_open: bool, force: bool) -> None:
    """Write an interactive page on which batch normalization can be touched, and open it.

    The page is one file that works offline, in English and Chinese: move the values of a mini-batch, its neighbors, gradients and running
    statistics, and see what follows. Panel modes reads the JSON of `batchnorm diagnose` of your own model.
    """
    if ctx.invoked_subcommand is not None:
        return
    if out is not None:  # the default file holds nothing of the reader's, and is written anew
        check_outputs({"--out": out}, force=force)
    path = out or DEFAULT
    write(path, render(spoken()))
    click.echo(tr("Wrote {file}.", file=path))
    address = path.resolve().as_uri() + (f"#panel={panel}" if panel else "")
    if not no_open and not webbrowser.open(address):
        click.echo(tr("No browser was found; open {address}.", address=address))


learn_command.add_command(start_command)
learn_command.add_command(check_command)
