"""`batchnorm env`: which kernels run here, and why."""

from __future__ import annotations

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from batchnorm.bench.allocator import Clone, measure_clone
from batchnorm.cli.common import Console
from batchnorm.cli.text import print_json
from batchnorm.env import Environment, environment


@click.command("env", epilog="Example: batchnorm env --json")
@click.option("--measure", is_flag=True, help="Time the creation of a 100 MB tensor with and without huge pages.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
def env_command(measure: bool, as_json: bool) -> None:
    """Show versions, machine, and which kernel runs for which input, and why."""
    found = environment()
    clone = measure_clone() if measure else None
    if as_json:
        measured = {} if clone is None else {"clone": clone.to_dict()}
        print_json({**found.to_dict(), **measured})
        return
    console = Console()
    console.print(_facts(found, clone))
    console.print()
    console.print(_kernels(found))
    for line in found.advice:
        console.print(f"\n{line}")


def _facts(found: Environment, clone: Clone | None) -> Table:
    table = Table.grid(padding=(0, 2))
    machine = found.machine
    allowed = "torch requests them" if found.torch_huge_pages else "torch does not request them"
    facts = {
        **found.versions,
        "cpu": f"{machine.cpu}, {machine.cores} core{'s' if machine.cores > 1 else ''}, {machine.system}",
        "instruction set": machine.isa,
        "threads": str(found.threads),
        **{f"kernel {name}": status for name, status in found.kernels.items()},
        "huge pages": f"{found.huge_pages}; {allowed}",
        "GPU": ", ".join(found.gpus) or "none",
    }
    if clone is not None:
        facts["a new tensor"] = str(clone)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _kernels(found: Environment) -> Table:
    """A table with a line for each device, dtype and layout; lines that differ only in the dtype are merged."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for choice in found.choices:
        because = "; ".join(f"{kernel}: {reason}" for kernel, reason in choice.refusals.items())
        key = (choice.device, choice.layout, choice.epilogue, choice.kernel, because)
        lines.setdefault(key, []).append(choice.dtype)
    table = Table(
        "device", "dtype", "layout", "with", "kernel", "because", box=SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for (device, layout, epilogue, kernel, because), dtypes in lines.items():
        table.add_row(device, ", ".join(dtypes), layout, epilogue, kernel, because or "it is the first")
    return table
