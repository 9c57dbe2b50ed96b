"""The unit of the lab's work: one arm of one experiment with one seed, and its stored result."""

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
    """Everything that a measurement depends on besides the code; `data_version` identifies the files in `setting.data`."""

    experiment: str
    arm: str
    setting: Setting
    data_version: str = ""

    @property
    def file_name(self) -> str:
        """A readable name that is unique for arguments, data and code; the path of the data does not matter."""
        arguments = asdict(self)
        arguments["setting"]["data"] = None
        version = code_version(experiments.module_of(self.experiment))
        key = hashlib.sha256(json.dumps([arguments, version], sort_keys=True).encode()).hexdigest()
        return f"{self.experiment}-{self.arm}-seed{self.setting.seed}-{self.setting.size}-{key[:12]}.json"

    def pack(self, finished: Finished) -> dict[str, Any]:
        """The result as plain data for JSON; the name of the file identifies the arguments."""
        return {"measured": packed(finished.measured), "seconds": finished.seconds}

    def unpack(self, data: Any) -> Finished:
        """The inverse of `pack`; raises ValueError, TypeError, KeyError or AttributeError on other data."""
        measured = unpacked(data["measured"])
        if not experiments.load(self.experiment).fits(measured):
            raise ValueError(f"not the metrics of {self.experiment}")
        return Finished(self, measured, float(data["seconds"]))


@dataclass(frozen=True)
class Finished:
    """A unit, its measurements, and the seconds of processor time that they took."""

    unit: Unit
    measured: Measured
    seconds: float


def measure(unit: Unit) -> Finished:
    """Measure one unit; runs in a worker process."""
    start = time.process_time()
    measured = experiments.load(unit.experiment).measure(unit.arm, unit.setting)
    return Finished(unit, measured, time.process_time() - start)


def packed(measured: Measured) -> dict[str, Any]:
    """Values and curves as plain data for JSON; NaN and infinities as strings."""
    return {
        "values": {name: spelled(value) for name, value in measured.values.items()},
        "curves": {name: [[spelled(x), spelled(y)] for x, y in points] for name, points in measured.curves.items()},
    }


def unpacked(data: Mapping[str, Any]) -> Measured:
    """The inverse of `packed`."""

    def points(listed: Sequence[Sequence[Any]]) -> list[tuple[float, float]]:
        return [(float(x), float(y)) for x, y in listed]

    return Measured(
        values={name: float(value) for name, value in data["values"].items()},
        curves={name: points(listed) for name, listed in data["curves"].items()},
    )
