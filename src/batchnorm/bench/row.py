"""Rows: each is one measurement with everything needed to understand it without the others."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchnorm import env
from batchnorm.bench.case import CACHES
from batchnorm.errors import InputError
from batchnorm.files import plain, read_json

SCHEMA = 1
UNITS = {"us": 1e6, "ms": 1e3}  # in a second


@dataclass(frozen=True)
class Row:
    """The measurement of one case with one provider.

    Attributes:
        suite: the network.
        case: what was timed, in words.
        shape: shape of the input, NxCx...
        count: how many layers of the network have this shape and epilogue; the weight in means.
        epilogue: fused operations, such as BN+add+relu.
        layout, dtype, direction, outputs, threads: as in `case.Case`; outputs is "-" if memory was not controlled.
        provider: the name of the implementation.
        metric, unit: metric and unit of the percentiles.
        p20, p50, p80: percentiles over the rounds.
        rounds: number of rounds, each with all providers.
        tensor_bytes: size of the input.
        limit: time for the necessary bytes at the speed of the copy in the same rounds, in `unit`; None for models.
        ratio_to_limit: p50 / limit.
        ratio_to_eager: eager's p50 / p50 in the same rounds, the speedup over eager.
        max_error: largest error of y or dx against float64; None if not compared.
        peak_bytes: peak memory of torch's allocator during a call, beyond the memory before; None if not measured.
        saved_bytes: memory saved for the backward of a model; None if not measured.
        cpu, cores, isa, system: the machine.
        batchnorm, torch, python, date: versions, and date of the measurement.
        load: the system's load average over the last minute, this process included; None if the system does not say.
        ranks: number of processes that synchronize.
        device: where it ran: "cpu", or the GPU.
    """

    suite: str
    case: str
    shape: str
    count: int
    epilogue: str
    layout: str
    dtype: str
    direction: str
    outputs: str
    threads: int
    provider: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    rounds: int
    tensor_bytes: int
    limit: float | None
    ratio_to_limit: float | None
    ratio_to_eager: float | None
    max_error: float | None
    peak_bytes: int | None
    saved_bytes: int | None
    cpu: str
    cores: int
    isa: str
    system: str
    batchnorm: str
    torch: str
    python: str
    date: str
    load: float | None = None
    ranks: int = 1
    device: str = "cpu"


def circumstances() -> dict[str, Any]:
    """The machine, its load, the versions and the date, for a row."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {**asdict(env.machine()), **env.versions(), "date": when, "load": load}


def to_dict(rows: Sequence[Row], command: str) -> dict[str, object]:
    """The rows as plain data for JSON, with the command that reproduces them; an infinite error is the text "inf"."""
    return {"schema": SCHEMA, "command": command, "rows": [plain(asdict(row)) for row in rows]}


def load(path: Path) -> list[Row]:
    """The rows of a file that `batchnorm bench --json` wrote.

    Raises:
        InputError: it is not such a file, or has another schema.
    """
    try:
        return [Row(**{name: _read(name, value) for name, value in row.items()}) for row in read_json(path)["rows"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} must be rows of schema {SCHEMA}: {error}; measure again") from error


_FLOATS = {field.name for field in fields(Row) if "float" in str(field.type)}


def _read(name: str, value: Any) -> Any:
    return float(value) if name in _FLOATS and isinstance(value, str) else value


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, with the names of the fields as header; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def memory(outputs: str) -> str:
    """The kind of outputs in words; on a GPU it is the L2 cache."""
    return f"{outputs} L2 cache" if outputs in CACHES else f"{outputs} outputs"


def threads(number: int) -> str:
    """The number of threads in words."""
    return "1 thread" if number == 1 else f"{number} threads"
