"""`batchnorm explain`: every step for a mini-batch of numbers. It starts at once, since it does not import torch."""

from __future__ import annotations

import sys
from typing import Any

import click

from batchnorm.cli.text import print_json
from batchnorm.explain import explain


class Numbers(click.ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Turn `1,0,-2.5` into a list."""
        try:
            return [float(number) for number in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} must be numbers separated by commas, such as 1,0,0,0", param, ctx)


@click.command(
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
        print_json(explanation.to_dict())
    else:
        click.echo(str(explanation), file=sys.stdout)  # by default click writes UTF-8, whatever the encoding of stdout
