"""`batchnorm demo`: the experiment `demo` of the lab, with a page of its own."""

from __future__ import annotations

import time
from pathlib import Path

import click

from batchnorm.cli.lab import measure_all
from batchnorm.cli.language import lang_option
from batchnorm.env import cores
from batchnorm.files import write
from batchnorm.lab import experiments, extras
from batchnorm.lab.experiment import Setting
from batchnorm.lab.runner import prepare
from batchnorm.language import tr


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
    help="Number of processes.  [default: cores, up to 4]",
)
@click.option("--json", "as_json", is_flag=True, help="Print verdicts and measurements as JSON, and nothing else.")
@lang_option
@click.pass_context
def demo_command(
    ctx: click.Context, data: Path | None, out: Path, seeds: int | None, quick: bool, workers: int, as_json: bool
) -> None:
    """Train a network with and without batch normalization, and compare.

    The network is the tutorial's, 784-512-256-10 with ReLU. Both variants train on the same batches from the same initial
    weights, for several learning rates and seeds. Writes result.json and report.html. Ctrl-C stores the finished
    measurements; run the same command again to continue.
    """
    start = time.perf_counter()
    extras.require()
    prepare(["demo"])
    setting = Setting(0, "quick" if quick else "default", data=None if data is None else str(data))
    files = {"demo": out / "result.json", "report.html": out / "report.html"}
    chosen = [experiments.load("demo")]
    ((experiment, outcome),) = measure_all(ctx, chosen, setting, seeds, files, out, workers, as_json)
    from batchnorm.report.lab import render_one  # after the work, since matplotlib loads slowly

    write(files["report.html"], render_one(experiment, outcome))
    if not as_json:
        done = tr(
            "Wrote {page} and {result} in {seconds:.0f} s.",
            page=files["report.html"],
            result=files["demo"],
            seconds=time.perf_counter() - start,
        )
        click.echo(f"\n{done}")
