"""Thread-local state of the context managers of this package."""

from __future__ import annotations

import threading
from typing import Any


class _Thread(threading.local):
    """The current `domain`, window of `accumulate`, micro-batch of `as_one_batch` and pass of an `Episode`; None outside of its context."""

    def __init__(self) -> None:  # runs in each thread; compiled code would not guard on a default of the class
        self.domain: str | None = None
        self.window: Any = None
        self.micro_batch: Any = None
        self.episode: Any = None


thread = _Thread()
