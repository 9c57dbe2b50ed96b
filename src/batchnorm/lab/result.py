"""The result of the demonstration: measurements, their summary, and how they were made, as plain data for JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from batchnorm.errors import InputError
from batchnorm.files import read_json, to_json, write
from batchnorm.version import __version__

SCHEMA = 1


@dataclass(frozen=True)
class Training:
    """One finished training.

    Attributes:
        arm: name of the compared variant.
        seed: seed of the initial weights and of the order of the batches.
        learning_rate: learning rate of plain stochastic gradient descent.
        steps: the steps at which the next four were measured: often at the learning rate common to all arms, rarely at others.
        validation_accuracy: share of correct classes, in evaluation mode.
        loss: loss of the batch before the step; None if not finite.
        percentiles: 15th, 50th and 85th percentile of the input of a typical unit of the last activation on the validation images,
            in evaluation mode; None if not finite. Empty, and `drift` None, at learning rates other than the common one.
        gradient_norms: norm of the gradient of each linear layer's weights, from input to output; None if not finite.
        drift: the largest distance of that unit's median from its start, in widths (15th to 85th) at the start.
        steps_to_target: first measured step with the target accuracy on validation; None if there is none.
        test_accuracy: share of correct classes after the last step.
        seconds: wall-clock time.
    """

    arm: str
    seed: int
    learning_rate: float
    steps: list[int]
    validation_accuracy: list[float]
    loss: list[float | None]
    percentiles: list[list[float | None]]
    gradient_norms: list[list[float | None]]
    drift: float | None
    steps_to_target: int | None
    test_accuracy: float
    seconds: float


@dataclass(frozen=True)
class Arm:
    """The summary of all trainings of one variant; lists have one entry per seed.

    Attributes:
        name: as in `Training.arm`.
        label: its name in tables and legends.
        best_learning_rate: the one with the best mean validation accuracy.
        test_accuracy: test accuracy at that learning rate.
        common_test_accuracy: test accuracy at the learning rate common to all arms.
        steps_to_target: steps to the target accuracy at the common learning rate.
        drift: drift at the common learning rate.
        trains_at: the learning rates at which every seed ends with the target accuracy on validation.
    """

    name: str
    label: str
    best_learning_rate: float | None
    test_accuracy: list[float]
    common_test_accuracy: list[float]
    steps_to_target: list[int | None]
    drift: list[float | None]
    trains_at: list[float]


@dataclass(frozen=True)
class Claim:
    """A statement that the experiment can contradict, whether it held, and the numbers."""

    claim: str
    holds: bool
    evidence: str


@dataclass(frozen=True)
class Result:
    """The complete result; `complete` is False if trainings are missing."""

    experiment: str
    question: str
    source: str
    protocol: dict[str, Any]
    arms: list[Arm]
    claims: list[Claim]
    trainings: list[Training]
    environment: dict[str, str]
    command: str
    complete: bool
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data for JSON."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write the result as JSON, completely or not at all."""
        write(path, to_json(self.to_dict()))

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote.

        Raises:
            InputError: the file is not a result of this version.
        """
        try:
            data = read_json(path)
            data["arms"] = [Arm(**arm) for arm in data["arms"]]
            data["claims"] = [Claim(**claim) for claim in data["claims"]]
            data["trainings"] = [Training(**training) for training in data["trainings"]]
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} must be a result of schema {SCHEMA}: {error}; run the experiment again"
            ) from error


def environment() -> dict[str, str]:
    """What is needed to reproduce the numbers: versions, kind of machine, and date."""
    return {
        "batchnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
