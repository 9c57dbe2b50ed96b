"""Rows: one measurement each, with all that is needed to understand it alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchnorm import env
from batchnorm.errors import InputError
from batchnorm.files import read_json

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """What one provider took for one case.

    Attributes:
        suite: network.
        case: what was timed, in words.
        shape: NxCx..., of the input.
        count: how many layers of the network have the shape and epilogue; its weight in means.
        epilogue: such as BN+add+relu.
        layout, dtype, direction, outputs, threads: as `case.Case`; outputs is "-" where nothing was arranged.
        provider: who was timed.
        metric, unit: of the next three.
        p20, p50, p80: percentiles over the rounds.
        rounds: how many there were, interleaved with the other providers.
        tensor_bytes: of the input.
        limit: what moving the bytes that must move takes at the speed of the copy in the same rounds, in `unit`; None for models.
        ratio_to_limit: p50 / limit.
        ratio_to_eager: eager's p50 / p50 in the same rounds: how many times faster than eager.
        max_error: against float64, of y or dx; None where nothing was computed.
        peak_bytes: what torch's allocator held at most during a call beyond what it held before; None where not looked at.
        saved_bytes: what was kept for the backward, of a model; None where not looked at.
        cpu, cores, isa, system: the machine.
        batchnorm, torch, python, date: versions, and when.
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


def circumstances() -> dict[str, Any]:
    """The machine, the versions and the date: what makes a row stand alone."""
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {**asdict(env.machine()), **env.versions(), "date": when}


def to_dict(rows: Sequence[Row], command: str) -> dict[str, object]:
    """The rows as JSON types, with the command that makes them again."""
    return {"schema": SCHEMA, "command": command, "rows": [asdict(row) for row in rows]}


def load(path: Path) -> list[Row]:
    """The rows of a file that `batchnorm bench --json` wrote.

    Raises:
        InputError: it is none of this version.
    """
    try:
        return [Row(**row) for row in read_json(path)["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} must be rows of schema {SCHEMA}: {error}; measure again") from error


def to_csv(rows: Sequence[Row]) -> str:
    """One line per row, under the names of the fields; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def threads(number: int) -> str:
    """In words."""
    return "1 thread" if number == 1 else f"{number} threads"
