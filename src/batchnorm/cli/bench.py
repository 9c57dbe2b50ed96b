"""`batchnorm bench`: measure, show the tables, write the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch

from batchnorm.bench import model as models
from batchnorm.bench import providers, replicas, run, suite
from batchnorm.bench.case import CACHES, DEVICES, DIRECTIONS, DTYPES, OUTPUTS, cases, quick, with_batch
from batchnorm.bench.networks import NETWORKS
from batchnorm.bench.row import Row, to_csv, to_dict
from batchnorm.bench.tables import case_tables, model_table, summary_tables
from batchnorm.bench.targets import summarize
from batchnorm.cli.common import Console, check_outputs, command_line, force_option, progress_bar
from batchnorm.env import cores
from batchnorm.files import to_json, write
from batchnorm.lab import extras

MINUTES, QUICK_MINUTES = 3.5, 0.3
ROUNDS, QUICK_ROUNDS = 7, 3
LEAST_ROUNDS = 5  # of each case
WIDTH = 120  # of a file or a pipe: nothing need be cut there


def _words(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[str]:  # noqa: ARG001 (click's)
    return [word for given in value for word in given.split(",") if word]


def _numbers(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[int]:
    try:
        return [int(word) for word in _words(ctx, param, value)]
    except ValueError as error:
        raise click.BadParameter("must be whole numbers separated by commas, such as 1,2", ctx, param) from error


def several(
    name: str, default: str | None, what: str, callback: Callable[..., Any] = _words
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option that accepts several words, separated by commas or by repeating the option."""
    shown = f"{what}  [default: {default}]" if default else what
    values = [] if default is None else [default]
    return click.option(name, multiple=True, default=values, metavar="A,B,...", callback=callback, help=shown)


@click.command("bench", epilog="Example: batchnorm bench --suite resnet50 --json out.json")
@several(
    "--suite", "resnet50", f"Networks whose batch norms are measured: {', '.join(suite.names())}, or a .toml file."
)
@several("--layout", "planar,channels_last", "Layouts.")
@several("--dtype", None, f"Any of {', '.join(DTYPES)}.  [default: float32, or the suite's]")
@several("--direction", None, f"Any of {', '.join(DIRECTIONS)}.  [default: forward, backward, inference]")
@several(
    "--outputs",
    "fresh",
    f"Memory of outputs, any of {', '.join(OUTPUTS)}; on a GPU the L2 cache, any of {', '.join(CACHES)}.",
)
@click.option("--device", type=click.Choice(DEVICES), default="cpu", show_default=True, help="Where to run.")
@several("--threads", f"1,{cores()}" if cores() > 1 else "1", "Numbers of threads.", _numbers)
@several("--ranks", str(replicas.RANKS), "Numbers of processes that synchronize, for --suite sync.", _numbers)
@several("--provider", None, f"Implementations to compare.  [default: {','.join(providers.USUAL)}, or the suite's]")
@click.option(
    "--minutes", type=click.FloatRange(min=0), help=f"Time to spend.  [default: {MINUTES}, quick: {QUICK_MINUTES}]"
)
@click.option("--quick", is_flag=True, help="Four of the layers, on all threads; for a model, a small batch.")
@several("--model", None, f"Time whole training steps instead, of any of {', '.join(NETWORKS)}.")
@click.option("--compile", "compiled", is_flag=True, help="For a model: compiled too, torch's layers and ours.")
@click.option("--fuse", "fused", is_flag=True, help="For a model: after bn.fuse too.")
@click.option("--memory", is_flag=True, help="For a model: with save_memory too.")
@click.option("--frozen", is_flag=True, help="For a model: with frozen batch norms too, torch's and ours.")
@click.option("--batch", type=click.IntRange(min=2), help="Batch size.  [default: the suite's, or the model's]")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help=f"Training steps of a model.  [default: {ROUNDS}, quick: {QUICK_ROUNDS}]",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File to write the rows to.")
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="File to write the rows to, as a table.")
@click.option("--report", type=click.Path(path_type=Path), help="HTML page to write, with plots.")
@force_option
@click.pass_context
def bench_command(
    ctx: click.Context,
    json_file: Path | None,
    csv_file: Path | None,
    report: Path | None,
    force: bool,
    **options: Any,
) -> None:
    """Measure batch normalization against a copy of the same bytes, and against other implementations.

    All implementations run alternately, in the same rounds; the tables show medians. A ratio of 1 to the limit is the speed of a
    copy. Ctrl-C shows the results so far.
    """
    if report is not None:
        extras.require()
    if options["device"] == "cuda":
        if not torch.cuda.is_available():
            raise click.BadParameter("torch finds no GPU here", ctx, param_hint="--device")
        options["outputs"] = options["outputs"] if _typed(ctx, "outputs") else list(CACHES)
        options["threads"] = [1]
    check_outputs({"--json": json_file, "--csv": csv_file, "--report": report}, force=force)
    command = command_line(ctx)
    measured, total = (_model if options["model"] else _suites)(ctx, options)
    rows, interrupted = _collect(measured, total)
    if csv_file is not None:  # first: a second Ctrl-C, or an error that JSON cannot hold, must not lose the rows
        write(csv_file, to_csv(rows))
    if json_file is not None:
        write(json_file, to_json(to_dict(rows, command)))
    _show(rows)
    if report is not None:
        from batchnorm.report.bench import render  # after the work, since matplotlib loads slowly

        write(report, render(rows, command))
    written = [str(path) for path in (json_file, csv_file, report) if path is not None]
    if written:
        click.echo(f"\nWrote {' and '.join(written)}.", err=True)
    if interrupted:
        click.echo("\nInterrupted; these are the results so far.", err=True)
        ctx.exit(130)


def _suites(ctx: click.Context, options: dict[str, Any]) -> tuple[Iterable[list[Row]], int]:
    """The rows of every case, and how many cases there are."""
    suites, threads = [suite.load(name) for name in options["suite"]], options["threads"]
    if options["batch"] is not None:
        suites = [with_batch(one, options["batch"]) for one in suites]
    if options["quick"]:
        suites = [quick(one) for one in suites]
        threads = threads if _typed(ctx, "threads") else [max(threads)]
    layouts, device = options["layout"], options["device"]
    chosen = cases(suites, layouts, options["dtype"], options["direction"], options["outputs"], threads, device)
    usual = QUICK_MINUTES if options["quick"] else MINUTES
    minutes = usual if options["minutes"] is None else options["minutes"]
    least = QUICK_ROUNDS if options["quick"] else LEAST_ROUNDS
    here = [case for case in chosen if case.through != "replicas"]
    there = [case for case in chosen if case.through == "replicas"]
    share = 60 * minutes / max(len(chosen), 1)
    found = providers.find(options["provider"] or [name for one in suites for name in one.providers] or providers.USUAL)
    ranks = options["ranks"]
    if min(ranks, default=2) < 2:
        raise click.BadParameter("must be at least 2: one process has nothing to wait for", ctx, param_hint="--ranks")
    together = (replicas.run(there, share * len(there) / len(ranks), least, number) for number in ranks)
    measured = chain(run.run(here, found, share * len(here), least), *together)
    return measured, len(here) + len(there) * len(ranks)


def _model(ctx: click.Context, options: dict[str, Any]) -> tuple[Iterable[list[Row]], int]:
    """The rows of models' training steps, one list for each model, layout, outputs and number of threads."""
    threads = options["threads"] if _typed(ctx, "threads") else [max(options["threads"])]
    rounds = options["rounds"] or (QUICK_ROUNDS if options["quick"] else ROUNDS)
    measured, total = [], 0
    for name in options["model"]:
        network = models.find(name)
        layouts = models.layouts_of(network, options["layout"])
        batch = options["batch"] or network.batch[options["quick"]]
        variants = _variants(ctx, options)
        settings = [
            models.Setting(layout, outputs, number, options["device"])
            for layout in layouts
            for outputs in options["outputs"]
            for number in threads
        ]
        measured.append(models.run(name, variants, settings, batch, rounds))
        total += len(settings)
    return chain.from_iterable(measured), total


def _variants(ctx: click.Context, options: dict[str, Any]) -> list[str]:
    """How the models are run beside torch's layers in eager mode."""
    if _typed(ctx, "provider"):
        return options["provider"]
    compiled = ["compile", "compile ours", *["compile fused"] * options["fused"]]
    return [
        "ours",
        *["fused"] * options["fused"],
        *["save memory"] * options["memory"],
        *["eval", "frozen", "frozen statistics"] * options["frozen"],
        *compiled * options["compiled"],
    ]


def _typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _collect(measured: Iterable[list[Row]], total: int) -> tuple[list[Row], bool]:
    """All rows, and whether Ctrl-C interrupted; shows a progress bar."""
    rows = list[Row]()
    try:
        with progress_bar() as progress:
            task = progress.add_task("measuring", total=total)
            for found in measured:
                rows += found
                progress.update(task, advance=1)
    except KeyboardInterrupt:
        return rows, True
    return rows, False


def _show(rows: list[Row]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    steps = [row for row in rows if row.case == "model step"]
    calls = [row for row in rows if row.case != "model step"]
    tables = [*case_tables(calls), *summary_tables(summarize(calls))]
    for table in [*tables, *([model_table(steps)] if steps else [])]:
        console.print(table)
        console.print()
