"""`batchnorm fold`: folds the batch norms of a model, and writes its weights or a program."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from batchnorm.cli.common import Console, check_outputs, force_option
from batchnorm.cli.export import PROGRAMS, export, require_exporter
from batchnorm.cli.models import SAFETENSORS, build, build_model, load_weights, redirected, require_format, save_weights
from batchnorm.cli.text import print_json, visible
from batchnorm.errors import BatchNormError, InputError
from batchnorm.folding import FoldReport, fold
from batchnorm.folding.record import example

_SHAPE = re.compile(r"\d+(x\d+)*")
_SUFFIXES = (*PROGRAMS, SAFETENSORS, ".pt")


@click.command(
    "fold",
    epilog="Example: batchnorm fold mynet:resnet --weights in.pt --input 1x3x224x224 --out model.onnx",
)
@click.argument("spec", metavar="MODEL")
@click.option(
    "--input",
    "given",
    required=True,
    metavar="SHAPE|SPEC",
    help="An example: a shape such as 1x3x224x224, or a factory that returns a tensor, a tuple of arguments or a dict.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="state_dict to read, from torch.save or .safetensors.  [default: the factory's]",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write: .onnx and .pt2 (torch.export) are programs, .safetensors and .pt weights.",
)
@click.option("--tolerance", type=click.FloatRange(min=0), default=1e-4, show_default=True, help="Accepted error.")
@force_option
@click.option("--fixed-batch", is_flag=True, help="Export for the example's batch size only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
def fold_command(
    spec: str,
    given: str,
    weights: Path | None,
    out: Path,
    tolerance: float,
    force: bool,
    fixed_batch: bool,
    as_json: bool,
) -> None:
    """Fold a model's batch norms into its convolutions and linear layers, check the result, and write it.

    MODEL names a factory, as package.module:factory; it is called without arguments. --out is written completely or not at
    all. Weights are those of the folded model, whose layers have the same names as before.
    """
    start = time.perf_counter()
    if out.suffix not in _SUFFIXES:
        raise InputError(f"--out must end in one of {', '.join(_SUFFIXES)}, but is {out}")
    require_format(out)
    require_exporter(out)
    check_outputs({"--out": out}, force=force)
    with redirected(as_json=as_json):
        model = build_model(spec)
        if weights is not None:
            load_weights(model, weights)
        inputs = _example(given)
        args, kwargs = example(inputs)
        folded, report = _fold(model, inputs, tolerance)
        written = None
        if out.suffix in PROGRAMS:
            written = export(folded, args, kwargs, out, fixed_batch=fixed_batch)
        else:
            save_weights(folded, out)
    if as_json:
        print_json({"out": str(out), "program_error": written, **report.to_dict()})
        return
    _show(report)
    checked = "" if written is None else f", read again, and compared: it differs by {written:.2g}"
    click.echo(f"\nWrote {out}{checked}. It took {time.perf_counter() - start:.0f} s.")


def _fold(model: nn.Module, inputs: Any, tolerance: float) -> tuple[nn.Module, FoldReport]:
    try:
        return fold(model, inputs, tolerance=tolerance)
    except BatchNormError:
        raise
    except Exception as error:
        raise InputError(
            f"the model must take the example, but {type(error).__name__}: {error}; check --input"
        ) from error


def _example(given: str) -> Any:
    if not _SHAPE.fullmatch(given):
        return build(given)
    try:
        return torch.randn([int(size) for size in given.split("x")], generator=torch.Generator().manual_seed(0))
    except (RuntimeError, ValueError, TypeError) as error:  # too large for torch, Python or the memory
        raise InputError(
            f"--input must be a shape whose tensor fits in memory, but is {given[:80]}; give a smaller one"
        ) from error


def _show(report: FoldReport) -> None:
    table = Table("batch norm", "result", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for pair in report.folded:
        table.add_row(visible(pair.batch_norm), visible(f"folded into {', '.join(pair.into)} ({pair.kind})"))
    for name, reason in report.left.items():
        table.add_row(visible(name), visible(f"left: {reason}"))
    console = Console()
    console.print(table)
    facts = Table.grid(padding=(0, 2))
    for merge in report.merged:
        facts.add_row("merged", visible(f"{', '.join(merge.branches)} into {merge.convolution}"))
    for name, reason in report.untraced.items():
        facts.add_row("not traced", visible(f"{name}: {reason}"))
    facts.add_row("batch norms", f"{report.batch_norms_before} before, {report.batch_norms_after} after")
    facts.add_row("parameters", f"{report.parameters_before:,} before, {report.parameters_after:,} after")
    facts.add_row("time", f"{1e3 * report.seconds_before:.3g} ms before, {1e3 * report.seconds_after:.3g} ms after")
    facts.add_row("error", f"{report.max_error:.2g} beside outputs up to {report.largest_output:.2g}")
    console.print(facts)
