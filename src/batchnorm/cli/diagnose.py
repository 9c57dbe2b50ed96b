"""`batchnorm diagnose`: says what batch norm does wrong in a model, and mends its weights."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text
from torch import nn

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
from batchnorm.cli.text import print_json
from batchnorm.diagnostics import FAMILIES, RULES, Diagnosis, Rule, diagnose, matching, rule_of
from batchnorm.diagnostics.formats import named, number
from batchnorm.diagnostics.progress import listening
from batchnorm.errors import BatchNormError, InputError

_STDOUT = Path("-")
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_IN_WEIGHTS = ("BN201", "BN202", "BN203", "BN501")  # what a state_dict can carry; other fixes change the model's code
_FILE = click.Path(path_type=Path)


@click.command(
    "diagnose",
    epilog="Example: batchnorm diagnose mynet:resnet --data mynet:loader --criterion torch.nn:CrossEntropyLoss",
)
@click.argument("spec", metavar="[MODEL]", required=False)
@click.option("--data", metavar="SPEC", help="Factory of the loader; without it the model never runs.")
@click.option(
    "--weights", type=_FILE, help="state_dict to read, from torch.save or .safetensors.  [default: the factory's]"
)
@click.option(
    "--criterion",
    metavar="SPEC",
    help="Loss (output, target), a function or a class such as torch.nn:CrossEntropyLoss.",
)
@click.option(
    "--objective", metavar="SPEC", help="Function (model, item) that returns the loss, in place of --criterion."
)
@click.option(
    "--forward", metavar="SPEC", help="Function (model, item) that calls the model with an item of the loader."
)
@click.option("--optimizer", metavar="SPEC", help="Function (model) that returns the optimizer.")
@click.option("--predict", metavar="SPEC", help="Your inference, a function (model, x).")
@click.option("--validate", metavar="SPEC", help="Your validation, a function (model).")
@click.option("--step", metavar="SPEC", help="Your training step, a function (model, item).")
@click.option(
    "--twin", metavar="SPEC", help="Factory of a model that should agree: an average, a target network, a port."
)
@click.option("--select", metavar="CODES", help="Codes to ask, or beginnings, with commas: BN2,BN501.  [default: all]")
@click.option("--ignore", metavar="CODES", help="Codes not to ask.")
@click.option("--html", type=_FILE, help="Page to write.")
@click.option("--json", "json_file", type=_FILE, help='JSON to write; "-" prints it, and nothing else, on stdout.')
@click.option("--sarif", type=_FILE, help="SARIF 2.1.0 to write, for code scanning.")
@click.option(
    "--fix", is_flag=True, help="Mend the running statistics, write the weights to --out, and diagnose again."
)
@click.option("--out", type=_FILE, help="Weights to write with --fix; .safetensors by its suffix.")
@force_option
@click.option("--list", "listing", is_flag=True, help="List the rules, and what each needs.")
@click.option("--explain", metavar="CODE", help="Explain a rule.")
@click.pass_context
def diagnose_command(
    ctx: click.Context,
    spec: str | None,
    data: str | None,
    weights: Path | None,
    select: str | None,
    ignore: str | None,
    html: Path | None,
    json_file: Path | None,
    sarif: Path | None,
    fix: bool,
    out: Path | None,
    force: bool,
    listing: bool,
    explain: str | None,
    **specs: str | None,
) -> None:
    """Say what batch norm does wrong in a model: where, by how much, and what mends it.

    MODEL names a factory, as package.module:factory; it is called without arguments, as are --data and --twin. Each option allows more
    rules. Exit codes: 0 no error found, 1 a finding of severity error, 2 bad usage.
    """
    if listing or explain is not None:
        _list() if listing else _explain(rule_of(explain or ""))
        return
    if spec is None:
        raise InputError("MODEL must name a factory, as package.module:factory, but it is missing")
    if fix != (out is not None) or (fix and data is None):
        raise InputError("--fix needs --data, whose statistics it computes, and --out, the file of weights to write")
    as_json = json_file == _STDOUT
    check_outputs(
        {"--html": html, "--json": None if as_json else json_file, "--sarif": sarif, "--out": out}, force=force
    )
    if out is not None:
        require_format(out)
    for codes in (select, ignore):
        matching(codes)  # before the model is built, which may take long
    with redirected(as_json=as_json):
        model = build_model(spec)
        if weights is not None:
            load_weights(model, weights)
        arguments = _arguments(model, specs)
        if data is not None:
            arguments["loader"] = build(data)
            check_data(arguments["loader"], data)
        fixed = None
        try:
            with progress_bar(TextColumn("{task.description}")) as progress, _shown_on(progress):
                found = diagnose(model, select=select, ignore=ignore, **arguments)
                if fix:
                    fixed = found.fix(model, [each.code for each in found.findings if each.code in _IN_WEIGHTS])
                    found = fixed.diagnosis
        except BatchNormError:
            raise
        except Exception as error:
            raise InputError(
                f"model, data and functions must fit together, but {type(error).__name__}: {error}; nothing was written (a loader "
                "whose items are neither tensors, tuples nor dicts needs --forward)"
            ) from error
    if out is not None:
        save_weights(model, out)
    if html is not None:
        found.to_html(html)
    if sarif is not None:
        found.to_sarif(sarif)
    if json_file is not None and not as_json:
        found.to_json(json_file)
    if as_json:
        print_json(found.to_data())
    else:
        for line in (
            ()
            if fixed is None
            else (*(f"did {each}" for each in fixed.changes), *(f"left {each}" for each in fixed.left))
        ):
            Console().print(line)
        _show(found)
    ctx.exit(1 if found.has_errors else 0)


def _shown_on(progress: Progress) -> AbstractContextManager[None]:
    """Show on a progress bar how far a diagnosis is."""
    task = progress.add_task("diagnosing", total=None)
    return listening(lambda text: progress.update(task, description=f"diagnosing: {text}"))


def _arguments(model: nn.Module, specs: dict[str, str | None]) -> dict[str, Any]:
    """The arguments of `diagnose` that these options name."""
    found = dict[str, Any]()
    for name, spec in specs.items():
        if spec is None:
            continue
        if name == "twin":
            found[name] = build_model(spec)
            continue
        value = find(spec)
        if name == "optimizer":
            value = value(model)
        elif isinstance(value, type):  # a loss class
            value = value()
        found[name] = value
    return found


def _show(found: Diagnosis) -> None:
    console = Console()
    if found.findings:
        table = Table("code", "severity", "layers", "found", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.columns[0].no_wrap = table.columns[1].no_wrap = True
        for each in found.findings:
            numbers = ", ".join(f"{name}={number(value)}" for name, value in each.evidence.items())
            text = f"{each.message}\n{numbers}\n→ {each.remedy}"
            severity = Text(each.severity, style=_STYLES[each.severity])
            table.add_row(each.code, severity, named(each.layers) or "the training loop", text)
            table.add_section()
        console.print(table)
    console.print(found.summary)
    for line in found.not_asked:
        if "replicas=" in line:  # models of other processes, which a command cannot name
            continue
        console.print(re.sub(r"(\w+)=", r"--\1", line).replace("--loader", "--data"))


def _list() -> None:
    table = Table("code", "severity", "needs", "finds", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for rule in RULES:
        table.add_row(rule.code, rule.severity, needs(rule), rule.title)
    Console().print(table)


def needs(rule: Rule) -> str:
    """What a rule needs, by the names of options."""
    return ", ".join(need.replace("loader", "data").replace("|", " or ") for need in rule.needs) or "–"


def _explain(rule: Rule) -> None:
    Console().print(
        f"{rule.code}: {rule.title} ({rule.severity}; {FAMILIES[rule.code[2]]})\n\n{rule.why}\n\n"
        f"with this library:  {rule.remedy}\nwith torch alone:   {rule.with_torch}\nneeds:              {needs(rule)}\n"
        f"mended by --fix:    {'yes' if rule.code in _IN_WEIGHTS else 'no'}\n\n{rule.url}"
    )
