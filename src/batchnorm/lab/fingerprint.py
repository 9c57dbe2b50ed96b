"""What a stored result depends on besides its arguments: the code that made it, and the user's data."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import torch

from batchnorm.errors import InputError

ROOT = Path(__file__).parent.parent  # of this package
NOT_READ = {".py", ".pyc", ".pyi"}


@cache
def code_version(module: str) -> str:
    """
    A digest of torch's version, of every source of this package that `module` names in an import, directly or through others,
    and of the files beside those in their folders (compiled kernels, data).

    What a module does not reach, such as another experiment, changes nothing.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(_reached(module)):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _reached(module: str) -> set[Path]:
    sources, waiting = set[Path](), [module]
    while waiting:
        path = _source(waiting.pop())
        if path is not None and path not in sources:
            sources.add(path)
            waiting += _imported(path)
    folders = {path.parent for path in sources}
    beside = {path for folder in folders for path in folder.iterdir() if path.is_file() and path.suffix not in NOT_READ}
    return sources | {path for path in beside if not path.name.startswith(".")}


def _source(module: str) -> Path | None:
    """The file of a module of this package; None for what is no module of it, such as a function that is imported."""
    first, *parts = module.split(".")
    path = ROOT.joinpath(*parts)
    if first != ROOT.name:
        return None
    found = (candidate for candidate in (path / "__init__.py", path.with_suffix(".py")) if candidate.is_file())
    return next(found, None)


def _imported(source: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            names += [
                name if _source(name) else node.module for name in inner
            ]  # a module of a package, or of a module's names
    return names


def data_version(directory: str | None) -> str:
    """
    A digest of the names, sizes and times of change of all files in a folder; "" without one.

    Raises:
        InputError: there is no such folder, or it cannot be read.
    """
    if directory is None:
        return ""
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"--data must be a folder; there is no folder {folder}")
    try:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        listed = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror or error}; choose another folder") from error
    return hashlib.sha256(repr(listed).encode()).hexdigest()
