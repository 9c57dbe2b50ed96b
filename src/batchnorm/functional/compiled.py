"""Runs compiled code uncompiled."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from batchnorm.torch_state import compiler_is_loaded


def eager() -> Any:
    """A context in which compiled code runs uncompiled: compiled code ignores hooks added later, and cannot wait for other threads."""
    if not compiler_is_loaded():
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
