"""The commands. Each reads its arguments, calls the library, and prints; exit code 0 is fine, 2 is bad usage, 130 Ctrl-C."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from batchnorm.cli.bench import bench_command
from batchnorm.cli.common import command_line, progress_bar
from batchnorm.cli.convert import convert_command
from batchnorm.cli.env import env_command
from batchnorm.cli.fold import fold_command
from batchnorm.cli.lab import lab_command
from batchnorm.cli.recalibrate import recalibrate_command
from batchnorm.env import cores
from batchnorm.errors import BatchNormError
from batchnorm.explain import explain
from batchnorm.lab import extras
from batchnorm.lab.data import load
from batchnorm.lab.experiments import learning_rates
from batchnorm.lab.result import Result, Training, to_json, write
from batchnorm.lab.runner import prepare, run
from batchnorm.report.rows import summary_rows
from batchnorm.version import __version__


class UserError(click.ClickException):
    """One line on stderr."""

    exit_code = 2


class Commands(click.Group):
    """Commands whose errors of ours are one line and exit code 2, and Ctrl-C one line and 130, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, turn a `BatchNormError` into click's own kind, and an interrupt into its exit code."""
        try:
            return super().invoke(ctx)
        except BatchNormError as error:
            raise UserError(" ".join(str(error).split())) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)


@click.group("batchnorm", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchnorm")
def commands() -> None:
    """Batch normalization for PyTorch: see it work, and see how it works."""


commands.add_command(bench_command)
commands.add_command(convert_command)
commands.add_command(env_command)
commands.add_command(lab_command)
commands.add_command(fold_command)
commands.add_command(recalibrate_command)


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Turn `1,0,-2.5` into a list."""
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} must be numbers with commas between them, such as 1,0,0,0", param, ctx)


@commands.command(
    "explain",
    context_settings={"ignore_unknown_options": True},  # -1 is a number, not an option
    epilog="Example: batchnorm explain 0.8 1.2 0.9 1.1 --gamma 0.5 --beta 2",
)
@click.argument("values", nargs=-1, required=True, type=float)
@click.option("--gamma", default=1.0, show_default=True, help="Scale of the output.")
@click.option("--beta", default=0.0, show_default=True, help="Shift of the output.")
@click.option("--eps", default=1e-5, show_default=True, help="Added to the variance before the square root.")
@click.option("--momentum", default=0.1, show_default=True, help="Weight of the new value in the running statistics.")
@click.option("--grad", type=Numbers(), metavar="G1,G2,...", help="dL/dy, one per value.  [default: 1,0,0,...]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def explain_command(
    values: tuple[float, ...],
    gamma: float,
    beta: float,
    eps: float,
    momentum: float,
    grad: list[float] | None,
    as_json: bool,
) -> None:
    """Show every step of batch normalization for the mini-batch VALUES, forward and backward."""
    explanation = explain(values, gamma, beta, eps, momentum, grad_output=grad)
    if as_json:
        click.echo(to_json(explanation.to_dict()), nl=False)
    else:
        click.echo(str(explanation))


@commands.command(epilog="Example: batchnorm demo --data mnist/ --out runs/mnist")
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
def demo(
    ctx: click.Context, data: Path | None, out: Path, seeds: int | None, quick: bool, workers: int, as_json: bool
) -> None:
    """Train a network with and without batch normalization, and compare.

    It is the tutorial's, 784-512-256-10 with ReLU. Both kinds see the same batches from the same initial weights, for
    several learning rates and seeds. Writes result.json and report.html. Ctrl-C keeps the trainings that are finished;
    the same command goes on from there.
    """
    start = time.perf_counter()
    extras.require()
    prepare(learning_rates.measure)
    plan = learning_rates.Plan.of(None if data is None else str(data), quick, seeds)
    dataset = load(plan.data)
    jobs, finished = plan.jobs(dataset), list[Training]()
    command = command_line(ctx)
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
        from batchnorm.report.page import render  # matplotlib takes a moment: after the work, not before

        write(out / "report.html", render(result))
    except KeyboardInterrupt:
        _show(learning_rates.summarize(plan, dataset, finished, command), as_json)
        kept = f"{len(finished)} of {len(jobs)} trainings are finished and kept"
        click.echo(f"\nInterrupted; {kept}. Continue with:\n  {command}", err=True)
        ctx.exit(130)
    _show(result, as_json)
    if not as_json:
        click.echo(f"\nWrote {out / 'report.html'} and {out / 'result.json'} in {time.perf_counter() - start:.0f} s.")


def _show(result: Result, as_json: bool) -> None:
    """The result on stdout: as JSON, or as a table with what became of the claims."""
    if as_json:
        click.echo(to_json(result.to_dict()), nl=False)
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
    console = Console(highlight=False)
    console.print(table)
    if result.claims:
        console.print()
        console.print(verdicts)
