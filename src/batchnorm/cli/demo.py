"""`batchnorm demo`: trains the tutorial's network with and without batch normalization, and writes a report."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from batchnorm.cli.common import Console, check_outputs, command_line, progress_bar
from batchnorm.cli.text import print_json
from batchnorm.env import cores
from batchnorm.files import write
from batchnorm.lab import extras
from batchnorm.lab.data import load
from batchnorm.lab.experiments import learning_rates
from batchnorm.lab.result import Result, Training
from batchnorm.lab.runner import all_stored, prepare, run
from batchnorm.report.rows import summary_rows


@click.command("demo", epilog="Example: batchnorm demo --data mnist/ --out runs/mnist")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Folder with MNIST's IDX files.  [default: bundled digits]"
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder to write."
)
@click.option("--seeds", type=click.IntRange(min=1), help="How often to repeat each training.  [default: 3, quick: 1]")
@click.option("--quick", is_flag=True, help="Three learning rates and fewer steps, in about ten seconds on two cores.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=lambda: min(cores(), 4),
    help="Processes.  [default: cores, up to 4]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON, and nothing else, on stdout.")
@click.pass_context
def demo_command(
    ctx: click.Context, data: Path | None, out: Path, seeds: int | None, quick: bool, workers: int, as_json: bool
) -> None:
    """Train a network with and without batch normalization, and compare.

    The network is the tutorial's, 784-512-256-10 with ReLU. Both variants train on the same batches from the same initial
    weights, for several learning rates and seeds. Writes result.json and report.html. After Ctrl-C, finished trainings
    are stored, and the same command continues.
    """
    start = time.perf_counter()
    extras.require()
    prepare(learning_rates.measure)
    plan = learning_rates.Plan.of(None if data is None else str(data), quick, seeds)
    dataset = load(plan.data)
    jobs, finished = plan.jobs(dataset), list[Training]()
    command = command_line(ctx)
    results = {"result.json": out / "result.json", "report.html": out / "report.html"}
    check_outputs({f"--out {out}: {name}": path for name, path in results.items()}, force=True)
    try:
        with (
            progress_bar() as progress,
            closing(run(learning_rates.measure, jobs, out / "parts", workers)) as trainings,
        ):
            task = progress.add_task("training", total=len(jobs))
            for training in trainings:
                finished.append(training)
                progress.update(task, advance=1)
        result = learning_rates.summarize(plan, dataset, finished, command)
        result.save(out / "result.json")
        from batchnorm.report.page import render  # after the work, since matplotlib loads slowly

        write(out / "report.html", render(result))
    except KeyboardInterrupt:
        finished = all_stored(jobs, out / "parts")
        _show(learning_rates.summarize(plan, dataset, finished, command), as_json)
        done = f"{len(finished)} of {len(jobs)} trainings are finished and stored"
        click.echo(f"\nInterrupted; {done}. Continue with:\n  {command}", err=True)
        ctx.exit(130)
    _show(result, as_json)
    if not as_json:
        click.echo(f"\nWrote {out / 'report.html'} and {out / 'result.json'} in {time.perf_counter() - start:.0f} s.")


def _show(result: Result, as_json: bool) -> None:
    """Print the result as JSON, or as a table with the verdicts on the claims."""
    if as_json:
        print_json(result.to_dict())
        return
    seeds, sizes = result.protocol["seeds"], result.protocol["sizes"]
    click.echo(
        f"{result.protocol['network']} on {result.protocol['dataset']}: {sizes['train']} images train, "
        f"{sizes['validation']} validate, {sizes['test']} test"
    )
    click.echo(f"{seeds} seed{'s' if seeds > 1 else ''}; mean ± standard deviation, or each seed in brackets\n")
    table = Table("", *(arm.label for arm in result.arms), box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for label, cells in summary_rows(result):
        table.add_row(label, *cells)
    verdicts = Table.grid(padding=(0, 2))
    for claim in result.claims:
        verdicts.add_row("held" if claim.holds else "not held", claim.claim)
    console = Console()
    console.print(table)
    if result.claims:
        console.print()
        console.print(verdicts)
