"""`batchnorm convert`: shows the conversion of a model as a tree, and writes its weights under torch's names."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, get_args

import click
from rich.text import Text
from rich.tree import Tree
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.cli.common import Console, check_outputs, force_option
from batchnorm.cli.models import build_model, load_weights, redirected, require_format, save_weights
from batchnorm.cli.text import print_json, visible
from batchnorm.errors import InputError
from batchnorm.interop.tutorial import is_hand_written
from batchnorm.layers import BatchNorm
from batchnorm.surgery import convert, fuse, is_frozen_norm, walk, why_left
from batchnorm.surgery.alternatives import Affine, Alternative, To
from batchnorm.surgery.by_hand import why_left_by_hand
from batchnorm.surgery.convert import why_not_replaced
from batchnorm.surgery.rewritten import Rewritten
from batchnorm.surgery.tracing import copied


@click.command("convert", epilog="Example: batchnorm convert mynet:resnet --weights old.pt --out new.safetensors")
@click.argument("spec", metavar="MODEL")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="state_dict to read, from torch.save or .safetensors; gamma and beta are read as weight and bias.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File of weights to write; .safetensors by its suffix.",
)
@click.option("--fuse", "fused", is_flag=True, help="Fuse additions and activations too.")
@click.option("--to", type=click.Choice(get_args(To)), help="Replace batch norms by layers that do not use the batch.")
@click.option(
    "--channels-per-group", type=click.IntRange(min=2), default=8, show_default=True, help="Fewest channels in a group."
)
@click.option("--standardize-weights", is_flag=True, help="With --to, also standardize the weights of convolutions.")
@click.option("--dry-run", is_flag=True, help="Show the plan, write nothing.")
@force_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
def convert_command(
    spec: str,
    weights: Path | None,
    out: Path | None,
    fused: bool,
    to: To | None,
    channels_per_group: int,
    standardize_weights: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Show what `batchnorm.convert` does to a model, layer by layer, and which layers it does not change, and why.

    MODEL names a factory, as package.module:factory; it is called without arguments. With --out, the weights of the converted model are
    written completely or not at all; they have the same names as in torch's layers. With --to they have no running statistics.
    """
    start = time.perf_counter()
    if out is not None:
        require_format(out)
        check_outputs({"--out": out}, force=force or dry_run)
    if to is not None and fused:
        raise InputError("--to leaves no batch norms that --fuse could fuse; give one of them")
    if standardize_weights and to is None:
        raise InputError("--standardize-weights needs --to")
    with redirected(as_json=as_json):
        original = build_model(spec)
        model = copied(original)
        model = fuse(model) if fused else convert(model)
        if weights is not None:
            load_weights(model, weights)
        if to is not None:
            convert(model, to=to, channels_per_group=channels_per_group, standardize_weights=standardize_weights)
    plan = _plan(original, model) if to is None else _replacements(original, model, Alternative(to, channels_per_group))
    writes = out is not None and not dry_run
    if writes:
        assert out is not None
        save_weights(model, out)
    if as_json:
        print_json({"out": str(out) if writes else None, "modules": plan})
        return
    _show(spec, original, plan)
    if writes:
        click.echo(f"\nWrote {out}. It took {time.perf_counter() - start:.0f} s.")


def _plan(original: nn.Module, model: nn.Module) -> list[dict[str, Any]]:
    """A row for each batch norm and each module with a fused forward: its class, what it becomes, or why it does not change."""
    rows = list[dict[str, Any]]()
    applied = {
        f"{slot.path}.{norm}".lstrip("."): what
        for slot in walk(model)
        if isinstance(rewritten := slot.module.__dict__.get("forward"), Rewritten)
        for norm, what in rewritten.applies.items()
    }
    for before, after in zip(walk(original), walk(model), strict=True):
        row: dict[str, Any] = {"module": before.path, "is": type(before.module).__name__}
        if "forward" in after.module.__dict__ and isinstance(after.module.forward, Rewritten):
            rows.append({**row, "becomes": "calls its batch norms with fused operations", "left": None})
        elif isinstance(after.module, BatchNorm):
            what = applied.get(after.path, after.module.activation)
            applies = "" if what is None else f", applies {what}"
            rows.append({**row, "becomes": f"batchnorm.{type(after.module).__name__}{applies}", "left": None})
        elif isinstance(before.module, _BatchNorm) or is_frozen_norm(before.module):
            rows.append({**row, "becomes": None, "left": why_left(before.module)})
        elif is_hand_written(before.module):
            rows.append({**row, "becomes": None, "left": why_left_by_hand(before.module)})
    return rows


def _replacements(original: nn.Module, model: nn.Module, alternative: Alternative) -> list[dict[str, Any]]:
    """A row for each batch norm: its class, the layer that does not use the batch, or why there is none."""
    reasons = why_not_replaced(original, alternative)
    rows = list[dict[str, Any]]()
    for before, after in zip(walk(original), walk(model), strict=True):
        left, becomes = reasons.get(id(before.module)), None
        if is_hand_written(before.module):
            left = why_left_by_hand(before.module)
        elif left is None and isinstance(before.module, _BatchNorm):
            becomes = _name_of(after.module)
        elif left is None:
            continue
        rows.append({"module": before.path, "is": type(before.module).__name__, "becomes": becomes, "left": left})
    return rows


def _name_of(layer: nn.Module) -> str:
    name = type(layer).__name__
    if isinstance(layer, nn.GroupNorm):
        size = layer.num_channels // layer.num_groups
        return f"torch.nn.{name}, {layer.num_groups} {'group' if layer.num_groups == 1 else 'groups'} of {size}"
    return "its weight and bias alone" if isinstance(layer, Affine) else f"torch.nn.{name}"


def _show(spec: str, original: nn.Module, plan: list[dict[str, Any]]) -> None:
    """Print the modules that contain a batch norm, as a tree."""
    rows = {row["module"]: row for row in plan}
    modules = {slot.path: slot.module for slot in walk(original)}
    shown = [name for name in modules if any(row == name or row.startswith(f"{name}.") or not name for row in rows)]
    branches: dict[str, Tree] = {}
    for name in shown or [""]:
        label = Text(f"{visible(name.rpartition('.')[2] or spec)}  ")
        label.append(visible(type(modules[name]).__name__), "dim")
        if name in rows:
            row = rows[name]
            if row["becomes"]:
                label.append(f" → {visible(row['becomes'])}")
            else:
                label.append("  ").append("left", "yellow").append(f": {visible(row['left'])}")
        branches[name] = branches[name.rpartition(".")[0]].add(label) if name else Tree(label)
    console = Console()
    console.print(branches[""])
    changed = {id(modules[row["module"]]) for row in plan if row["left"] is None}  # one may be in several places
    total = {id(modules[row["module"]]) for row in plan}
    console.print(f"\n{len(changed)} of {len(total)} change." if plan else "\nIt has no batch norm.")
