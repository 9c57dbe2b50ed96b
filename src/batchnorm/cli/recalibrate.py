"""`batchnorm recalibrate`: computes population statistics over a data set, and writes the weights with them."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.cli.common import Console, check_outputs, force_option, progress_bar
from batchnorm.cli.models import (
    build,
    build_model,
    check_data,
    find,
    load_weights,
    redirected,
    require_format,
    save_weights,
)
from batchnorm.cli.text import print_json, visible
from batchnorm.errors import BatchNormError, InputError
from batchnorm.population import METHODS, Progress, recalibrating
from batchnorm.surgery import batch_norms, walk
from batchnorm.surgery.by_hand import hand_written, why_left_by_hand


@click.command(
    "recalibrate",
    epilog="Example: batchnorm recalibrate mynet:resnet --data mynet:train_loader --weights in.pt --out out.pt",
)
@click.argument("spec", metavar="MODEL")
@click.option("--data", required=True, metavar="SPEC", help="Factory of the loader.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="state_dict to read, from torch.save or .safetensors.  [default: the factory's]",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="File to write; .safetensors by its suffix."
)
@force_option
@click.option(
    "--forward", metavar="SPEC", help="Function (model, item) that calls the model with an item of the loader."
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="joint",
    show_default=True,
    help="One pass, or several, layer by layer.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Batches to read in each pass.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
def recalibrate_command(
    spec: str,
    data: str,
    weights: Path | None,
    out: Path,
    force: bool,
    forward: str | None,
    method: str,
    limit: int | None,
    as_json: bool,
) -> None:
    """Give a model's batch norms the population statistics of a data set, and write its weights.

    MODEL and --data name factories, as package.module:factory; they are called without arguments. --out is written at the end, completely
    or not at all.
    """
    start = time.perf_counter()
    require_format(out)
    check_outputs({"--out": out}, force=force)
    with redirected(as_json=as_json):
        model = build_model(spec)
        if weights is not None:
            load_weights(model, weights)
        loader = build(data)
        check_data(loader, data)
        call = None if forward is None else find(forward)
        before = _statistics(model)
        last = Progress(0, 0, 0, 0)
        try:
            with (
                progress_bar() as progress,
                closing(recalibrating(model, loader, forward=call, method=method, limit=limit)) as steps,
            ):
                total = _length(loader, limit)
                task = progress.add_task("reading", total=total)
                for last in steps:
                    text = f"pass {last.number}, {last.final} of {last.layers} layers are final"
                    progress.update(task, description=text, completed=last.batches)
        except BatchNormError:
            raise
        except Exception as error:
            raise InputError(
                f"model and data must fit together, but {type(error).__name__}: {error}; nothing was written (a loader whose items "
                "are neither tensors, tuples nor dicts needs --forward)"
            ) from error
    if not last.layers:
        by_hand = hand_written(walk(model))
        hint = "".join(f"; of {name}: {why_left_by_hand(layer)}" for name, layer in by_hand.items())
        raise InputError(
            f"{spec} must have a batch norm with running statistics that is not frozen, but has none{hint}"
        )
    save_weights(model, out)
    rows = _changes(before, _statistics(model))
    if as_json:
        print_json({"out": str(out), "method": method, "passes": last.number, "batches": last.batches, "layers": rows})
        return
    _show(rows)
    passes = f"{last.number} pass{'es' if last.number > 1 else ''}"
    click.echo(f"\nWrote {out} after {passes} over {last.batches} batches in {time.perf_counter() - start:.0f} s.")


def _statistics(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (layer.running_mean.double().clone(), layer.running_var.double().clone())
        for name, layer in batch_norms(model).items()
        if layer.running_mean is not None and layer.running_var is not None and not is_lazy(layer.running_mean)
    }


def _changes(
    before: dict[str, tuple[Tensor, Tensor]], after: dict[str, tuple[Tensor, Tensor]]
) -> list[dict[str, str | float | None]]:
    """The largest change of each layer's statistics over its channels: the mean in standard deviations, the variance as a ratio."""
    rows = list[dict[str, str | float | None]]()
    for name, (mean, variance) in after.items():
        old_mean, old_variance = before[name]
        ratios = variance / old_variance
        at = (ratios.log().abs()).argmax()
        shift, ratio = ((mean - old_mean).abs() / variance.sqrt()).max().item(), ratios[at].item()
        rows.append({"layer": name, "mean_shift": _finite(shift), "variance_ratio": _finite(ratio)})
    return rows


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _show(rows: list[dict[str, str | float | None]]) -> None:
    table = Table("layer", "mean changed by", "variance", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in rows:
        shift, ratio = row["mean_shift"], row["variance_ratio"]
        table.add_row(
            visible(str(row["layer"])),
            "–" if shift is None else f"{shift:.3g} deviations",
            "–" if ratio is None else f"× {ratio:.3g}",
        )
    Console().print(table)


def _length(loader: object, limit: int | None) -> int | None:
    try:
        batches = len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError:  # an iterable need not know its length
        return limit
    return batches if limit is None else min(batches, limit)
