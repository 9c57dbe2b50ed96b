"""`batchnorm learn`: exercises that check themselves."""

from __future__ import annotations

import click

from batchnorm.cli.learn_exercises import check_command, start_command


@click.group("learn", epilog="Example: batchnorm learn start && batchnorm learn check exercises")
def learn_command() -> None:
    """Ten exercises that check themselves and name what is misunderstood."""


learn_command.add_command(start_command)
learn_command.add_command(check_command)
