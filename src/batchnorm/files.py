"""JSON that any parser reads, and files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchnorm.errors import InputError


def to_json(data: Any) -> str:
    """Strict JSON: NaN and infinity, which JSON cannot express, raise a ValueError."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n"


def spelled(value: float) -> float | str:
    """A number that JSON can hold: NaN and the infinities become "nan", "inf" and "-inf", which `float` reads back."""
    return float(value) if math.isfinite(value) else str(float(value))


def check_writable(directory: Path) -> None:
    """Create `directory` if needed and check that files can be created in it: before an hour's work rather than after.

    Raises:
        InputError: files cannot be created there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise InputError(f"cannot write into {directory}: {error.strerror or error}; choose another folder") from error


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same suffix. The file written there replaces `path`, unless the block raises."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        InputError: `path` cannot be written.
    """
    try:
        with whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
