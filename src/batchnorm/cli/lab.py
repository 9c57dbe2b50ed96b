"""`batchnorm lab`: lists and runs the experiments, and writes a report of their results."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.box import SIMPLE_HEAD
from rich.progress import ProgressColumn, Task
from rich.table import Table
from rich.text import Text

from batchnorm.cli.common import Console, check_outputs, command_line, force_option, progress_bar
from batchnorm.cli.language import lang_option
from batchnorm.cli.text import one_line, print_json
from batchnorm.env import cores
from batchnorm.errors import InputError
from batchnorm.files import write
from batchnorm.lab import experiments, extras, result
from batchnorm.lab.experiment import KINDS, WORDS, Experiment, Setting, Size, Verdict, summary
from batchnorm.lab.fingerprint import data_version
from batchnorm.lab.result import Damaged, Outcome
from batchnorm.lab.runner import all_stored, run
from batchnorm.lab.translated import translated
from batchnorm.lab.unit import Finished, Unit, measure
from batchnorm.language import speaking, tr
from batchnorm.report.rows import SIZES, comparison, extent

OUT = Path("runs/lab")
SEEDS, QUICK_SEEDS = 3, 1
SHARES = {"quick": 0.5, "default": 1.0, "full": 5.0}  # of an estimate, by size; quick runs took a fifth to all of it

out_option = click.option(
    "--out", type=click.Path(path_type=Path), default=OUT, show_default=True, help="Folder of the results."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")


@click.group("lab", epilog="Example: batchnorm lab run lr-range depth && batchnorm lab report")
def lab_command() -> None:
    """Measure claims about batch normalization on this machine."""


@lab_command.command("list", epilog="Example: batchnorm lab list")
@out_option
@json_option
@lang_option
def list_command(out: Path, as_json: bool) -> None:
    """List the experiments: the question of each, how long it takes, and the result so far."""
    extras.require()
    found = _known(out)
    if as_json:
        print_json([_to_dict(*each) for each in found])
        return
    heads = tr("experiment"), tr("question"), tr("time"), tr("result so far")
    table = Table(*heads, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for kind, title in KINDS.items():
        group = [(experiment, known) for experiment, known in found if experiment.kind == kind]
        if group:
            table.add_section()
            table.add_row(Text(tr(title), "bold"))
        for experiment, known in group:
            mark = " *" if experiment.name in experiments.FIRST else ""
            row = (experiment.name + mark, tr(experiment.question), _time(experiment, known), _state(experiment, known))
            table.add_row(*row)
    console = Console()
    console.print(table)
    estimates = _estimates([each for each, _ in found])
    notes = [tr("Time is that of one core: divide it by the number of cores. {estimates}", estimates=estimates)]
    if first := [name for name in experiments.FIRST if name in experiments.NAMES]:
        notes.append(tr("* Start here: {command}", command=f"batchnorm lab run {' '.join(first)} --quick"))
    for note in notes:
        console.print(note, soft_wrap=not console.is_terminal)


def _estimates(listed: Sequence[Experiment]) -> str:
    """What the estimates are, and on which machines they were measured."""
    machines = dict[str, list[str]]()
    for experiment in listed:
        machines.setdefault(experiment.timed_on, []).append(experiment.name)
    where = [
        (tr("measured on {machine}", machine=tr(machine)) if machine else tr("a guess"))
        + (f" ({', '.join(names)})" if len(machines) > 1 else "")
        for machine, names in machines.items()
    ]
    return tr("~ is an estimate for the default size and {seeds} seeds, {where}.", seeds=SEEDS, where="; ".join(where))


def _known(out: Path) -> list[tuple[Experiment, Outcome | Damaged | None]]:
    """Every experiment with its stored outcome; damaged ones give a warning on stderr.

    Raises:
        InputError: the folder is a file.
    """
    if out.is_file():
        raise InputError(f"--out must be a folder; {out} is a file")
    return [(experiment, _loaded(experiment.name, out)) for experiment in map(experiments.load, experiments.NAMES)]


def _loaded(name: str, out: Path) -> Outcome | Damaged | None:
    try:
        return result.load(name, out)
    except InputError as error:
        click.echo(f"Warning: {one_line(error)}", err=True)
        return Damaged()


def _time(experiment: Experiment, known: Outcome | Damaged | None) -> str:
    """Seconds of one core: measured, or estimated for the default size."""
    if not isinstance(known, Outcome) or not known.verdicts(experiment):
        return f"~{SEEDS * experiment.seconds:.0f} s"
    return f"{known.seconds:.0f} s"


def _state(experiment: Experiment, known: Outcome | Damaged | None) -> str:
    """The result so far, with size and seeds if they are not the default."""
    if known is None:
        return "–"
    if isinstance(known, Damaged):
        return tr("damaged: run it again")
    if not known.fits(experiment):
        return tr("has other arms or metrics: run it again")
    verdicts = known.verdicts(experiment)
    answer = tr("{finished} of {units} measured", finished=known.finished, units=known.units)
    if verdicts:
        answer = summary(verdicts)
    if (known.size, known.seeds) == ("default", SEEDS):
        return answer
    size = tr(SIZES[known.size])
    if known.seeds == 1:
        return f"{answer} ({tr('{size}, 1 seed', size=size)})"
    return f"{answer} ({tr('{size}, {seeds} seeds', size=size, seeds=known.seeds)})"


def _to_dict(experiment: Experiment, known: Outcome | Damaged | None) -> dict[str, Any]:
    """For JSON, which is English."""
    with speaking("en"):
        verdicts = known.verdicts(experiment) if isinstance(known, Outcome) else {}
    return {
        "experiment": experiment.name,
        "question": experiment.question,
        "begin_here": experiment.name in experiments.FIRST,
        "claims": [{"claim": claim, **_answer(verdicts.get(claim))} for claim in experiment.claims],
        "outcome": known.to_dict() if isinstance(known, Outcome) else None,
    }


def _answer(verdict: Verdict | None) -> dict[str, str | None]:
    return {"answer": None, "evidence": None} if verdict is None else asdict(verdict)


@lab_command.command("run", epilog="Example: batchnorm lab run lr-range paper-4.1 --seeds 5")
@click.argument("names", nargs=-1, required=True, metavar="NAME...|all")
@out_option
@click.option(
    "--seeds", type=click.IntRange(min=1), help=f"How often to run each arm.  [default: {SEEDS}, quick: {QUICK_SEEDS}]"
)
@click.option("--quick", is_flag=True, help="The smallest size that shows the effect, about 20 s per experiment.")
@click.option("--full", is_flag=True, help="More data and more steps: an hour or more for all.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device of the networks, for experiments that support it.",
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Folder with your own data, for experiments that accept it."
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=cores, help="Processes of one thread each.  [default: cores]"
)
@json_option
@lang_option
@click.pass_context
def run_command(
    ctx: click.Context,
    names: Sequence[str],
    out: Path,
    seeds: int | None,
    quick: bool,
    full: bool,
    device: str,
    data: Path | None,
    workers: int,
    as_json: bool,
) -> None:
    """Run experiments by name, or all.

    Stored measurements are not repeated, unless their code or options have changed. Ctrl-C stores the finished measurements; run the same
    command again to continue.
    """
    extras.require()
    chosen = [experiments.load(name) for name in dict.fromkeys(names) if name != "all"]  # an unknown name raises
    if "all" in names:
        chosen = list(map(experiments.load, experiments.NAMES))
    if quick and full:
        raise InputError("a run has one size: leave out --quick or --full")
    size: Size = "quick" if quick else "full" if full else "default"
    setting = Setting(0, size, device, None if data is None else str(data))
    files = {each.name: result.path_of(each.name, out) for each in chosen}
    measure_all(ctx, chosen, setting, seeds, files, out, workers, as_json)
    if not as_json:
        command = f"batchnorm lab report --out {shlex.quote(str(out))}"
        click.echo("\n" + tr("For the page: {command}", command=command))


def measure_all(
    ctx: click.Context,
    chosen: Sequence[Experiment],
    setting: Setting,
    seeds: int | None,
    files: Mapping[str, Path],
    out: Path,
    workers: int,
    as_json: bool,
) -> list[tuple[Experiment, Outcome]]:
    """Measure experiments, write the outcome of each into its file, and print them; after Ctrl-C, print those so far and exit with 130.

    `files` maps the name of each experiment, and of other files that the command will write, to a path; `out` stores the measurements.

    Raises:
        InputError: a file cannot be written, or as `_units` or an experiment.
    """
    seeds = seeds or (QUICK_SEEDS if setting.size == "quick" else SEEDS)
    units, command = _units(chosen, setting, seeds), command_line(ctx)
    check_outputs({f"--out {out}: {name}": path for name, path in files.items()}, force=True)  # they are overwritten

    def outcomes(finished: Sequence[Finished]) -> list[tuple[Experiment, Outcome]]:
        own = {each.name: [one for one in finished if one.unit.experiment == each.name] for each in chosen}
        return [(each, Outcome.of(each, seeds, own[each.name], command)) for each in chosen if own[each.name]]

    finished = list[Finished]()
    costs = {each.name: each.seconds * SHARES[setting.size] / len(each.arms) for each in chosen}
    total = sum(costs[unit.experiment] for unit in units)
    try:
        with progress_bar(TimeLeft()) as progress, closing(run(measure, units, out / "units", workers)) as done:
            ends = time.monotonic() + time_left(costs, units, finished, workers)
            task = progress.add_task(tr("{finished} of {units}", finished=0, units=len(units)), total=total, ends=ends)
            for each in done:
                finished.append(each)
                name = each.unit.experiment
                known = {experiment.name: so_far for experiment, so_far in outcomes(finished)}
                known[name].save(files[name])  # at once, so that a later failure does not lose it
                ends = time.monotonic() + time_left(costs, units, finished, workers)
                description = tr(
                    "{finished} of {units}, last {name}", finished=len(finished), units=len(units), name=name
                )
                progress.update(task, advance=costs[name], description=description, ends=ends)
    except KeyboardInterrupt:
        finished = all_stored(units, out / "units")
        _show(outcomes(finished), as_json)
        done = tr(
            "Interrupted; {finished} of {units} measurements are finished and stored. Continue with:",
            finished=len(finished),
            units=len(units),
        )
        click.echo(f"\n{done}\n  {command}", err=True)
        ctx.exit(130)
    _show(outcomes(finished), as_json)
    return outcomes(finished)


def time_left(costs: Mapping[str, float], units: Sequence[Unit], finished: Sequence[Finished], workers: int) -> float:
    """Estimated seconds until all `units` are finished.

    `costs` are estimated seconds of a unit by experiment; the finished ones tell how much slower or faster they are here.
    """
    done = sum(costs[each.unit.experiment] for each in finished)
    pace = sum(each.seconds for each in finished) / done if done else 1.0
    known = {each.unit for each in finished}
    waiting = [pace * costs[unit.experiment] for unit in units if unit not in known]
    return max(sum(waiting) / workers, max(waiting, default=0.0))


class TimeLeft(ProgressColumn):
    """Counts down to `ends` of a task, in seconds of `time.monotonic`."""

    def render(self, task: Task) -> Text:
        """The time left as minutes and seconds."""
        left = max(0, round(task.fields["ends"] - time.monotonic()))
        return Text(tr("about {time} left", time=f"{left // 60}:{left % 60:02d}"))


def _units(chosen: Sequence[Experiment], setting: Setting, seeds: int) -> list[Unit]:
    """The units to measure, one experiment after the other, with all arms of a seed next to each other.

    The first arm, the baseline, comes last: it is usually the fastest, so that workers finish at about the same time.

    Raises:
        InputError: the device does not exist, or an experiment does not run there; no experiment accepts the data, or `data` is not a
            folder.
    """
    try:
        torch.empty(0, device=setting.device)
    except (RuntimeError, AssertionError) as error:  # torch raises an AssertionError if it was built without the device
        first = str(error).splitlines()[0]
        raise InputError(f"--device must be one that torch can use here; {setting.device} is not: {first}") from error
    bound = [experiment.name for experiment in chosen if experiment.cpu_only]
    if torch.device(setting.device).type != "cpu" and bound:
        raise InputError(
            f"--device is for experiments that run on any device, but {', '.join(bound)} run on the CPU only; omit these or --device"
        )
    if setting.data is not None and not any(experiment.data for experiment in chosen):
        raise InputError(f"--data is for experiments that accept data, but {', '.join(e.name for e in chosen)} do not")
    version = data_version(setting.data)
    units = list[Unit]()
    for experiment in chosen:
        own = setting if experiment.data else replace(setting, data=None)
        units += [
            Unit(experiment.name, arm, replace(own, seed=seed), version if own.data else "")
            for seed in range(seeds)
            for arm in reversed(list(experiment.arms))
        ]
    return units


def _show(known: Sequence[tuple[Experiment, Outcome]], as_json: bool) -> None:
    """Print the outcomes as JSON, or for each experiment a table and the verdict on each claim."""
    if as_json:
        print_json([_to_dict(*each) for each in known])
        return
    console = Console()
    for number, (english, came_out) in enumerate(known):
        experiment = translated(english)
        columns, rows = comparison(experiment, came_out.results())
        table = Table("", *columns, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for label, cells in rows:
            table.add_row(label, *cells)
        judged = Table.grid(padding=(0, 2))
        for claim, verdict in came_out.verdicts(experiment).items():
            judged.add_row(tr(WORDS[verdict.answer]), claim)
            judged.add_row("", verdict.evidence)
        if number:
            console.print()
        console.print(Text(experiment.name, "bold").append(f": {experiment.question}", "not bold"))
        console.print(extent(experiment, came_out) + "\n")
        console.print(table)
        if judged.row_count:
            console.print()
            console.print(judged)


@lab_command.command("report", epilog="Example: batchnorm lab report --page lab.html")
@out_option
@click.option("--page", type=click.Path(path_type=Path), help="File to write.  [default: report.html in the folder]")
@force_option
@lang_option
def report_command(out: Path, page: Path | None, force: bool) -> None:
    """Write one HTML page with all results so far, finished or not. The page loads nothing from the network."""
    extras.require()
    known = _known(out)
    if not any(isinstance(came_out, Outcome) for _, came_out in known):
        raise InputError(f"a report needs results, but {out} has none; run batchnorm lab run all --out {out}")
    target = out / "report.html" if page is None else page
    check_outputs({"--page": target}, force=force or page is None)  # the page in the folder is overwritten
    from batchnorm.report.lab import render  # after the checks, since matplotlib loads slowly

    write(target, render(known))
    click.echo(tr("Wrote {file}.", file=target))


@lab_command.command("findings", epilog="Example: batchnorm lab findings --page docs/findings.md")
@out_option
@click.option("--page", type=click.Path(path_type=Path), default=Path("docs/findings.md"), show_default=True)
@force_option
def findings_command(out: Path, page: Path, force: bool) -> None:
    """Write the complete results as a Markdown page, and the plots into a folder next to it."""
    extras.require()
    complete, incomplete = list[tuple[Experiment, Outcome]](), list[str]()
    for experiment, came_out in _known(out):
        if isinstance(came_out, Outcome) and came_out.verdicts(experiment):
            complete.append((experiment, came_out))
        else:
            incomplete.append(experiment.name)
    if not complete:
        raise InputError(f"findings need complete results, but {out} has none; run batchnorm lab run all --out {out}")
    quick = [experiment.name for experiment, came_out in complete if came_out.size == "quick"]
    if quick:
        raise InputError(
            f"findings need runs of size default or full, but {', '.join(quick)} ran with --quick; run them again without it"
        )
    check_outputs({"--page": page}, force=force)
    from batchnorm.report.findings import render

    with speaking("en"):  # the page is of the English documentation
        text, drawings = render(complete, page.stem)
    write(page, text)
    for name, svg in drawings.items():
        write(page.with_suffix("") / name, svg)
    click.echo(f"Wrote {page} and {len(drawings)} plots.")
    if incomplete:
        click.echo(f"Not included, because they are incomplete: {', '.join(incomplete)}.")
