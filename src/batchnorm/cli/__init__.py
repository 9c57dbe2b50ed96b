"""The commands. Each reads its arguments, calls the library, and prints. Exit codes: 0 success, 1 errors that `diagnose` found,
2 bad usage, 130 Ctrl-C.

Each command is a module, imported only when the command runs, since most need torch, which takes seconds to load.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from batchnorm.cli.language import lang_option
from batchnorm.cli.text import accept_any_text, one_line
from batchnorm.errors import BatchNormError
from batchnorm.version import __version__

# For the list of commands, which imports no command: the first sentence of each command's help.
SUMMARIES = {
    "bench": "Measure batch normalization against a copy of the same bytes, and against other implementations.",
    "convert": "Show what `batchnorm.convert` does to a model, layer by layer, and which layers it does not change, and why.",
    "demo": "Train a network with and without batch normalization, and compare.",
    "diagnose": "Say what batch norm does wrong in a model: where, by how much, and what mends it.",
    "env": "Show versions, machine, and which kernel runs for which input, and why.",
    "explain": "Show every step of batch normalization for the mini-batch VALUES, forward and backward.",
    "fold": "Fold a model's batch norms into its convolutions and linear layers, check the result, and write it.",
    "lab": "Measure claims about batch normalization on this machine.",
    "learn": "Write an interactive page on which batch normalization can be touched, and open it.",
    "recalibrate": "Give a model's batch norms the population statistics of a data set, and write its weights.",
}


class UserError(click.ClickException):
    """An error that prints one line on stderr."""

    exit_code = 2


class Commands(click.Group):
    """A group that imports commands when they run. A command NAME is `NAME_command` in the module NAME of this folder.

    Errors of this library print one line and exit with code 2, Ctrl-C prints one line and exits with 130; neither prints a traceback.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line, with a stdout of any encoding."""
        accept_any_text()
        return super().main(*args, **options)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Import the command in place of its summary, which `--help` and completion read."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = getattr(import_module(f"{__name__}.{name}"), f"{name}_command")
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn a `BatchNormError` into a `UserError`, and an interrupt into its exit code."""
        try:
            return super().invoke(ctx)
        except BatchNormError as error:
            raise UserError(one_line(error)) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)


@click.group(
    "batchnorm",
    cls=Commands,
    commands=[click.Command(name, help=summary) for name, summary in SUMMARIES.items()],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@lang_option
@click.version_option(__version__, prog_name="batchnorm")
def commands() -> None:
    """Batch normalization for PyTorch: see it work, and see how it works."""
