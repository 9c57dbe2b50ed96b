"""What the contexts of this folder say, each for its own thread."""

from __future__ import annotations

import threading
from typing import Any


class _Thread(threading.local):
    """Attributes: the `domain` that counts, the window of `accumulate`, and the part of `as_one_batch`, each None outside of it."""

    def __init__(self) -> None:  # for each thread; a default of the class would be no guard to compiled code
        self.domain: str | None = None
        self.window: Any = None
        self.part: Any = None


thread = _Thread()
