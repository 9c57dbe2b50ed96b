"""Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167) for PyTorch. `import batchnorm as bn`.

A public name is imported on first use (PEP 562), and torch with it. `__init__.pyi` lists the names, for type checkers and for this file.
"""

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

# At once: otherwise importing the module `batchnorm.explain` elsewhere would set this name to the module. It needs no torch.
from batchnorm.explain import explain as explain

_HOMES = {
    alias.name: str(line.module)
    for line in ast.parse(Path(__file__).with_suffix(".pyi").read_bytes()).body
    if isinstance(line, ast.ImportFrom)
    for alias in line.names
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll] (it reads __init__.pyi instead)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")  # a module without a public name, such as `folding`
    home = _HOMES[name]
    is_module = home == __name__  # `from batchnorm import errors`
    value = importlib.import_module(f"{home}.{name}") if is_module else getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
