"""`batchnorm explain`: every step for a mini-batch of numbers. It starts at once, since it does not import torch."""

from __future__ import annotations

import difflib
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from batchnorm.cli.batch import Batch, read, reshaped, row, typed
from batchnorm.cli.language import lang_option
from batchnorm.cli.text import print_json
from batchnorm.errors import InputError
from batchnorm.explain import Explanation, explain
from batchnorm.language import tr, wrapped

MOST_ROWS = 24  # of a table on a terminal
MOST_CHANNELS = 4  # shown in full, if no channel is chosen


class Numbers(click.ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Turn `1,0,-2.5` into a list."""
        numbers = row(value)
        if numbers is None:
            self.fail(f"{value!r} must be numbers separated by commas, such as 1,0,0,0", param, ctx)
        return numbers


class Shape(click.ParamType):
    """Sizes separated by x."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Turn `2x3x2x2` into sizes."""
        sizes = value.split("x")
        if not all(size.isascii() and size.isdigit() and int(size) for size in sizes):
            self.fail(f"{value!r} must be sizes separated by x, such as 2x3x2x2", param, ctx)
        return tuple(map(int, sizes))


@click.command(
    "explain",
    context_settings={"ignore_unknown_options": True},  # -1 is a number, not an option
    epilog="Example: batchnorm explain 0.8 1.2 0.9 1.1 --gamma 0.5 --beta 2",
)
@click.argument("values", nargs=-1, required=True)
@click.option("--shape", type=Shape(), metavar="NxCx...", help="Read the values as this shape; axis 1 is the channels.")
@click.option("--channel", type=click.IntRange(0), metavar="C", help="Show this channel alone, counted from 0.")
@click.option("--gamma", default=1.0, show_default=True, help="Scale of the output.")
@click.option("--beta", default=0.0, show_default=True, help="Shift of the output.")
@click.option("--eps", default=1e-5, show_default=True, help="Added to the variance before the square root.")
@click.option("--momentum", default=0.1, show_default=True, help="Weight of the new value in the running statistics.")
@click.option("--grad", type=Numbers(), metavar="G1,G2,...", help="dL/dy, one per value.  [default: 1,0,0,...]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page of its own instead.")
@click.option("--force", "-f", is_flag=True, help="Overwrite a file that exists.")
@lang_option
@click.pass_context
def explain_command(
    ctx: click.Context,
    values: tuple[str, ...],
    shape: tuple[int, ...] | None,
    channel: int | None,
    gamma: float,
    beta: float,
    eps: float,
    momentum: float,
    grad: list[float] | None,
    as_json: bool,
    html: Path | None,
    force: bool,
) -> None:
    """Show every step of batch normalization for the mini-batch VALUES, forward and backward.

    VALUES are the numbers of one channel, or rows with commas, a row per sample and a column per channel: 1,10 2,20 4,40. They may also
    be one file (.npy, or text with a row per line, such as .csv and .txt), or - for such text on standard input.
    """
    _refuse_options(ctx, values)
    if as_json and html is not None:
        raise click.UsageError("--json prints and --html writes a page: leave out one of them", ctx)
    batch = typed(values)
    if batch is None and len(values) == 1:
        batch = read(values[0])
    if batch is None:
        wrong = next(value for value in values if row(value) is None)
        raise click.UsageError(
            f"{wrong!r} is neither a number nor a row such as 1,2.5; a file must be the only argument", ctx
        )
    if shape is not None:
        batch = reshaped(batch, shape)
    upstream = None if grad is None else _like(grad, batch)
    found = {
        index: explain(column, gamma, beta, eps, momentum, grad_output=None if upstream is None else upstream[index])
        for index, column in _chosen(batch, channel).items()
    }
    if as_json:
        print_json(_json(batch, found))
    elif html is not None:
        _write(html, batch, found, force)
        click.echo(tr("Wrote {file}.", file=html))
    else:
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if terminal else None
        text = _text(batch, found, channel is not None, width, MOST_ROWS if terminal else None)
        click.echo(text, file=sys.stdout)  # by default click writes UTF-8, whatever the encoding of stdout


def _refuse_options(ctx: click.Context, values: tuple[str, ...]) -> None:
    """Raise for an option that does not exist; click passes it on as a value, as it does a negative number."""
    known = [name for option in ctx.command.params for name in option.opts if name.startswith("-")] + ["--help"]
    for value in values:
        if value.startswith("-") and value != "-" and row(value) is None:
            name = value.partition("=")[0]
            near = [each for each in difflib.get_close_matches(name, known) if each != name]  # -- --gamma is a value
            raise click.NoSuchOption(name, possibilities=near, ctx=ctx)


def _chosen(batch: Batch, channel: int | None) -> dict[int, tuple[float, ...]]:
    """The values of the channel, or of all, by number."""
    columns = dict(enumerate(batch.channels()))
    if channel is None:
        return columns
    if channel not in columns:
        raise InputError(f"--channel must be one of 0 to {len(columns) - 1}, but got {channel}")
    return {channel: columns[channel]}


def _like(grad: list[float], batch: Batch) -> list[tuple[float, ...]]:
    """dL/dy of each channel."""
    if len(grad) != len(batch.values):
        raise InputError(f"--grad must have one number per value, but got {len(grad)} for {len(batch.values)} values")
    return Batch(tuple(grad), batch.shape).channels()


def _json(batch: Batch, found: dict[int, Explanation]) -> dict[str, Any]:
    """The explanation of a single row; for several axes their shape, and an explanation per channel."""
    if len(batch.shape) == 1:
        return found[0].to_dict()
    channels = [{"channel": batch.name(index), **it.to_dict()} for index, it in found.items()]
    return {"shape": list(batch.shape), "channels": channels}


def _text(batch: Batch, found: dict[int, Explanation], chosen: bool, width: int | None, rows: int | None) -> str:
    """The steps of each channel; where there are many, what came out for each."""
    if len(batch.shape) == 1:
        return found[0].text(width, rows)
    sizes = " x ".join(map(str, batch.shape))
    head = tr(
        "Shape {sizes}: {channels} channels on axis 1, the statistics of each over all other axes",
        sizes=sizes,
        channels=len(batch.channels()),
    )
    head = head if width is None else "\n".join(wrapped(head, width))
    if len(found) > MOST_CHANNELS and not chosen:
        lines = [head, "", tr("channel: mean, biased variance, running mean, running variance")]
        lines += [
            f"  {batch.name(index)}: {it.mean:.6g}, {it.variance:.6g}, {it.running_mean:.6g}, {it.running_variance:.6g}"
            for index, it in found.items()
        ]
        return "\n".join([*lines, "", tr("--channel 0 shows every step of one channel.")])
    return "\n\n".join([head, *(f"{_channel(batch, index)}\n\n{it.text(width, rows)}" for index, it in found.items())])


def _channel(batch: Batch, index: int) -> str:
    return tr("Channel {name}", name=batch.name(index))


def _write(path: Path, batch: Batch, found: dict[int, Explanation], force: bool) -> None:
    """Write the page; what it needs is imported here, so that the tables come at once."""
    from batchnorm.cli.common import check_outputs
    from batchnorm.files import write
    from batchnorm.report.explanation import render

    check_outputs({"--html": path}, force=force)
    write(
        path,
        render({_channel(batch, index) if len(batch.shape) > 1 else "": it for index, it in found.items()}),
    )
