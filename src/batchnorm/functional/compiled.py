"""What compiled code cannot do."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch


def eager() -> Any:
    """A context in which compiled code runs as written: it does not see hooks that came after it, and cannot wait for other threads."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and loading the compiler takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
