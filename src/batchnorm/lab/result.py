"""The outcome of an experiment, complete or not: measurements by arm and seed, and how they were made."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch

from batchnorm.errors import InputError
from batchnorm.files import read_json, to_json, write
from batchnorm.lab.experiment import Experiment, Measured, Results, Size, Verdict
from batchnorm.lab.unit import Finished, packed, unpacked
from batchnorm.version import __version__

SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """
    One experiment's measurements.

    Attributes:
        experiment: its name.
        size: the size of the run.
        device: the device of the networks.
        data: the folder with the user's data, if any.
        by_arm: one entry for each seed, in their order; None if not measured.
        seconds: processor time of all measurements together.
        environment: versions, kind of machine, and date.
        command: the command that ran it.
    """

    experiment: str
    size: Size
    device: str
    data: str | None
    by_arm: Mapping[str, Sequence[Measured | None]]
    seconds: float
    environment: Mapping[str, str]
    command: str

    @classmethod
    def of(cls, experiment: Experiment, seeds: int, finished: Sequence[Finished], command: str) -> Outcome:
        """The outcome of finished units, at least one, of a run with `seeds` seeds."""
        measured = {(each.unit.arm, each.unit.setting.seed): each.measured for each in finished}
        setting = finished[0].unit.setting
        return cls(
            experiment=experiment.name,
            size=setting.size,
            device=setting.device,
            data=setting.data,
            by_arm={arm: [measured.get((arm, seed)) for seed in range(seeds)] for arm in experiment.arms},
            seconds=sum(each.seconds for each in finished),
            environment={
                "batchnorm": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": f"{platform.system()} {platform.machine()}",
                "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            },
            command=command,
        )

    @property
    def seeds(self) -> int:
        """Number of seeds of each arm."""
        return max(map(len, self.by_arm.values()), default=0)

    @property
    def finished(self) -> int:
        """Number of measured units."""
        return sum(measured is not None for seeds in self.by_arm.values() for measured in seeds)

    @property
    def units(self) -> int:
        """Number of all units."""
        return sum(map(len, self.by_arm.values()))

    def results(self) -> Results:
        """All measurements so far; arms without any are included."""
        return Results({arm: [each for each in seeds if each is not None] for arm, seeds in self.by_arm.items()})

    def fits(self, experiment: Experiment) -> bool:
        """Whether the arms and metrics are those that the experiment has now."""
        measured = (each for seeds in self.by_arm.values() for each in seeds if each is not None)
        return set(self.by_arm) == set(experiment.arms) and all(map(experiment.fits, measured))

    def verdicts(self, experiment: Experiment) -> dict[str, Verdict]:
        """The verdict on each claim; empty if the outcome is incomplete."""
        if self.finished < self.units or not self.fits(experiment):
            return {}
        results = self.results()
        return {claim: judge(results) for claim, judge in experiment.claims.items()}

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain data for JSON."""
        by_arm = {arm: [None if each is None else packed(each) for each in seeds] for arm, seeds in self.by_arm.items()}
        return {"schema": SCHEMA} | vars(self) | {"by_arm": by_arm}

    def save(self, path: Path) -> None:
        """Write it as JSON, completely or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        write(path, to_json(self.to_dict()))


@dataclass(frozen=True)
class Damaged:
    """Stands for an outcome whose file is damaged; a new run of the experiment replaces it."""


def path_of(experiment: str, directory: Path) -> Path:
    """The file of an experiment's outcome in a folder of the lab's results."""
    return directory / f"{experiment}.json"


def load(experiment: str, directory: Path) -> Outcome | None:
    """
    Load an experiment's outcome from a folder of the lab's results; None if there is no file.

    Raises:
        InputError: the file is not an outcome of this version.
    """
    path = path_of(experiment, directory)
    try:
        data = read_json(path)
        if data.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        data["by_arm"] = {
            arm: [None if each is None else unpacked(each) for each in seeds] for arm, seeds in data["by_arm"].items()
        }
        outcome = Outcome(**data)
        _check(outcome, experiment)
        return outcome
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} must be an outcome of schema {SCHEMA}: {error}; run the experiment again") from error


def _check(outcome: Outcome, experiment: str) -> None:
    """Raise a ValueError or TypeError if a field has a wrong value, since JSON does not check types."""
    if outcome.experiment != experiment:
        raise ValueError(f"it is of {outcome.experiment}")
    if outcome.size not in get_args(Size):
        raise ValueError(f"no size is {outcome.size}")
    if len({len(seeds) for seeds in outcome.by_arm.values()}) != 1 or not outcome.finished:
        raise ValueError("each arm must have the same number of seeds, and one of them a measurement")
    if not math.isfinite(outcome.seconds):
        raise ValueError(f"it took {outcome.seconds} seconds")
    texts = [
        outcome.device,
        outcome.data or "",
        outcome.command,
        outcome.environment["date"],
        *outcome.environment.values(),
    ]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("device, data, command and environment must be text")
