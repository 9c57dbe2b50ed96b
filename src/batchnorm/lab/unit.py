"""The unit of the lab's work: one arm of one experiment with one seed, and what is stored of it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from batchnorm.files import spelled
from batchnorm.lab import experiments
from batchnorm.lab.experiment import Measured, Setting
from batchnorm.lab.fingerprint import code_version


@dataclass(frozen=True)
class Unit:
    """Everything that a measurement depends on besides the code; `data_version` stands for the files in `setting.data`."""

    experiment: str
    arm: str
    setting: Setting
    data_version: str = ""

    @property
    def file_name(self) -> str:
        """Readable, and different for different arguments, data or code; where the data lie does not matter."""
        arguments = asdict(self)
        arguments["setting"]["data"] = None
        version = code_version(experiments.module_of(self.experiment))
        key = hashlib.sha256(json.dumps([arguments, version], sort_keys=True).encode()).hexdigest()
        return f"{self.experiment}-{self.arm}-seed{self.setting.seed}-{self.setting.size}-{key[:12]}.json"

    def pack(self, finished: Finished) -> dict[str, Any]:
        """The result as JSON types; the arguments stand in the name of the file."""
        return {"measured": packed(finished.measured), "seconds": finished.seconds}

    def unpack(self, data: Any) -> Finished:
        """What `pack` made, as it was; a ValueError, TypeError, KeyError or AttributeError if it is something else."""
        measured = unpacked(data["measured"])
        if not experiments.load(self.experiment).fits(measured):
            raise ValueError(f"not the metrics of {self.experiment}")
        return Finished(self, measured, float(data["seconds"]))


@dataclass(frozen=True)
class Finished:
    """A unit, what was measured, and the processor's seconds it took: of the clock it may be more, where others compute too."""

    unit: Unit
    measured: Measured
    seconds: float


def measure(unit: Unit) -> Finished:
    """Run one unit; in a worker."""
    start = time.process_time()
    measured = experiments.load(unit.experiment).measure(unit.arm, unit.setting)
    return Finished(unit, measured, time.process_time() - start)


def packed(measured: Measured) -> dict[str, Any]:
    """Values and curves as JSON types, numbers that JSON has not as words."""
    return {
        "values": {name: spelled(value) for name, value in measured.values.items()},
        "curves": {name: [[spelled(x), spelled(y)] for x, y in points] for name, points in measured.curves.items()},
    }


def unpacked(data: Mapping[str, Any]) -> Measured:
    """What `packed` made."""

    def points(listed: Sequence[Sequence[Any]]) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in listed]

    return Measured(
        values={name: float(value) for name, value in data["values"].items()},
        curves={name: points(listed) for name, listed in data["curves"].items()},
    )
