"""Says how far a diagnosis is: to whoever listens, or after two seconds in a line on the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

QUIET = 2.0  # seconds before the first line
_EVERY = 0.2  # seconds between two

Item = TypeVar("Item")
Listener = Callable[[str], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


class _Line:
    """A line on the terminal that is written again and again; none if a diagnosis is quick, or nobody watches."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._shown = False

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now - self._start < QUIET or now - self._last < _EVERY or not is_watched():
            return
        self._last, self._shown = now, True
        sys.stderr.write(f"\r\x1b[Kdiagnose: {text}, {now - self._start:.0f} s")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def is_watched() -> bool:
    """Whether standard error is a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Give what a diagnosis says in this context to a function."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show the progress in this context on the terminal, unless somebody listens already."""
    if _listener.get() is not None:
        yield
        return
    line = _Line()
    try:
        with listening(line):
            yield
    finally:
        line.clear()


def counted(items: Iterable[Item], what: str) -> Iterator[Item]:
    """The items, each announced by its number."""
    listener = _listener.get()
    for number, item in enumerate(items, 1):
        if listener is not None:
            listener(f"{what}, batch {number}")
        yield item
