"""Strict JSON, and atomic writes of files."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from batchnorm.errors import InputError


def to_json(data: Any) -> str:
    """Strict JSON: NaN and infinity, which JSON cannot express, raise a ValueError."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The data of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON, is nested too deeply for Python's parser, or has an integer beyond 64 bits.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the integer {digits[:20]}... is beyond 64 bits")
    return int(digits)


def spelled(value: float) -> float | str:
    """A number for JSON: NaN and the infinities become "nan", "inf" and "-inf", which `float` reads back."""
    return float(value) if math.isfinite(value) else str(float(value))


def plain(value: Any) -> Any:
    """Data for JSON, with every number in it `spelled`."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return spelled(value) if isinstance(value, float) else value


def check_writable(directory: Path) -> None:
    """Create `directory` if needed and check that files can be created in it, so that errors come before long work.

    Raises:
        InputError: files cannot be created there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise InputError(f"cannot write into {directory}: {error.strerror or error}; choose another folder") from error


def check_file(path: Path) -> bool:
    """Check that `whole(path)` can write, so that errors come before long work; return whether it would replace a file.

    Raises:
        InputError: `path` is a folder, or no file can be created there.
    """
    try:
        target, status = _target(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another name") from error
    if status is not None and not stat.S_ISREG(status.st_mode):
        return False
    check_writable((target if path.is_symlink() else path).parent)  # errors name the folder that the user typed
    return status is not None


def _target(path: Path) -> tuple[Path, os.stat_result | None]:
    """The path to write to, with links to regular files resolved, and the status of the existing file, or None.

    Raises:
        OSError: the path is a folder, or cannot exist.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):  # creating the folder raises the second one again
        status = None
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if status is None or stat.S_ISREG(status.st_mode):
        path = Path(os.path.realpath(path))
    return path, status


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path with the suffix of `path`; at the end its content becomes that of `path`, unless the block raises.

    A regular file is replaced atomically and keeps its mode and, if permitted, its owner. For a symbolic link, its target is replaced.
    A device, a pipe, or a file with several hard links is written into, after the block.

    Raises:
        OSError: `path` cannot be written, or is a folder.
    """
    target, status = _target(path)
    if status is not None and (not stat.S_ISREG(status.st_mode) or status.st_nlink > 1):
        with tempfile.TemporaryDirectory() as directory:
            temporary = Path(directory, f"content{path.suffix}")
            yield temporary
            with temporary.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(6)}{path.suffix}")
    # The content of a private file is private from its first byte.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if status is None else 0o600))
    try:
        yield temporary
        if status is not None:
            with suppress(PermissionError, AttributeError):  # only root may change owners; Windows has no chown
                os.chown(temporary, status.st_uid, status.st_gid)
            temporary.chmod(stat.S_IMODE(status.st_mode))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a text file, completely or not at all.

    Raises:
        InputError: `path` cannot be written.
    """
    try:
        with whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
