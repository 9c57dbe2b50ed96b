"""Digests of the code and of the user's data, which identify a stored result together with its arguments."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import torch

from batchnorm.errors import InputError

ROOT = Path(__file__).parent.parent  # the folder of this package
NOT_READ = {".py", ".pyc", ".pyi"}


@cache
def code_version(module: str) -> str:
    """
    A digest of torch's version, of every source of this package that `module` imports, directly or indirectly, and of the other files in
    the same folders (compiled kernels, data).

    It does not depend on sources that the module does not import, such as other experiments.
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
    """The file of a module of this package; None for other names, such as imported functions."""
    first, *names = module.split(".")
    path = ROOT.joinpath(*names)
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
            names += [name if _source(name) else node.module for name in inner]  # a module, or a name in a module
    return names


def data_version(directory: str | None) -> str:
    """
    A digest of names, sizes and modification times of all files in a folder; "" without a folder.

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
