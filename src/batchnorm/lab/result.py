"""What an experiment leaves behind: measurements, their summary, and where and how they were made. Plain data, plain JSON."""

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
        seed: of the initial weights and of the order of the batches.
        learning_rate: of plain stochastic gradient descent.
        steps: at which the next four were measured: often at the learning rate common to all arms, seldom at others.
        validation_accuracy: share, in evaluation mode.
        loss: of the batch before the step; None where it was not finite.
        percentiles: 15th, 50th and 85th of what a typical unit of the last activation receives of the validation images, in
            evaluation mode; None where not finite. Empty, like `drift`, at other learning rates than the one common to all arms.
        gradient_norms: of each linear layer's weights, from input to output; None where not finite.
        drift: how far that unit's median went from its start at most, in widths (15th to 85th) of the start.
        steps_to_target: first measured step with the target accuracy on validation; None if there is none.
        test_accuracy: share, after the last step.
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
    """What all trainings of one variant say together; lists have one entry per seed.

    Attributes:
        name: as in `Training.arm`.
        label: for tables and legends.
        best_learning_rate: chosen by mean validation accuracy.
        test_accuracy: at that learning rate.
        common_test_accuracy: at the learning rate common to all arms.
        steps_to_target: at the common learning rate.
        drift: at the common learning rate.
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
    """A statement the experiment can contradict: what was claimed, whether it held here, and the numbers."""

    claim: str
    holds: bool
    evidence: str


@dataclass(frozen=True)
class Result:
    """An experiment's whole outcome; `complete` is False when some of its trainings are missing."""

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
        """The result as JSON types."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write the result as JSON, whole or not at all."""
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
    """What a reader needs to know to make the numbers again: versions, the kind of machine, and when."""
    return {
        "batchnorm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
