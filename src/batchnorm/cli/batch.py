"""Mini-batches that are typed, or read from a file or standard input, without torch."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from batchnorm.errors import InputError, MissingExtraError

_SEPARATOR = re.compile(r"\s*[,;]\s*|\s+")


@dataclass(frozen=True)
class Batch:
    """Numbers and their shape.

    Attributes:
        values: in the order of memory.
        shape: (m,) for one channel, otherwise (N, C, *S).
        names: of the channels, if the file has them.
    """

    values: tuple[float, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()

    def channels(self) -> list[tuple[float, ...]]:
        """The values of each channel, in the order of memory."""
        if len(self.shape) == 1:
            return [self.values]
        C, S = self.shape[1], math.prod(self.shape[2:])
        return [
            tuple(value for start in range(c * S, len(self.values), C * S) for value in self.values[start : start + S])
            for c in range(C)
        ]

    def name(self, channel: int) -> str:
        """What a channel is called: its number, and the name in the file."""
        return f"{channel} ({self.names[channel]})" if self.names else str(channel)


def row(text: str) -> list[float] | None:
    """The numbers of `1,-2.5`, or None if it is none."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return None


def typed(words: tuple[str, ...]) -> Batch | None:
    """Numbers, or rows with commas; None if a word is neither.

    Raises:
        InputError: the rows differ in length.
    """
    rows = [numbers for word in words if (numbers := row(word)) is not None]
    return _stacked(rows, "VALUES") if len(rows) == len(words) else None


def reshaped(batch: Batch, shape: tuple[int, ...]) -> Batch:
    """The same values with another shape.

    Raises:
        InputError: it has another number of values.
    """
    if math.prod(shape) != len(batch.values):
        raise InputError(
            f"--shape must hold all values, but {'x'.join(map(str, shape))} has {math.prod(shape)} and {len(batch.values)} were given"
        )
    return Batch(batch.values, shape)


def read(name: str) -> Batch:
    """The numbers of a file, or of standard input for "-".

    Raises:
        InputError: it cannot be read, or is not rows of numbers.
        MissingExtraError: a .npy file without NumPy.
    """
    if name == "-":
        return parsed(
            sys.stdin.read().removeprefix("\ufeff"), "standard input"
        )  # the mark that Windows puts before UTF-8
    path = Path(name)
    try:
        return _array(path) if path.suffix.lower() == ".npy" else parsed(path.read_text(encoding="utf-8-sig"), name)
    except FileNotFoundError as error:
        raise InputError(
            f"VALUES must be numbers or a file, but {name!r} is neither; give numbers such as 0.8 1.2"
        ) from error
    except (OSError, UnicodeError) as error:
        raise InputError(f"{name} must be a text of numbers or a .npy file, but {error}") from error


def parsed(text: str, source: str) -> Batch:
    """Rows of numbers, one per line, with commas, semicolons or spaces between; `#` begins a comment, and a first line of words names.

    Raises:
        InputError: a word is no number, rows differ in length, or a line has commas beside semicolons, which may be decimal commas.
    """
    rows, names = list[list[float]](), tuple[str, ...]()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if "," in line and ";" in line:
            raise InputError(
                f"{source} must have one separator, but line {number} has commas and semicolons; write decimal points and one of them"
            )
        words = [word.strip("\"'") for word in _SEPARATOR.split(line)] if line else []
        numbers = [row(word) for word in words]
        if words and not rows and not names and not any(numbers):
            names = tuple(words)
        elif None in numbers:
            wrong = words[numbers.index(None)]
            raise InputError(
                f"{source} must have rows of numbers, but line {number} has {wrong!r}; leave out what is no number"
            )
        elif words:
            rows.append([value for found in numbers if found for value in found])
    batch = _stacked(rows, source)
    fits = len(batch.shape) > 1 and len(names) == batch.shape[1]
    return Batch(batch.values, batch.shape, names if fits else ())


def _stacked(rows: list[list[float]], source: str) -> Batch:
    """(m,) from one row or one column, otherwise (N, C)."""
    lengths = {len(found) for found in rows}
    if not rows:
        raise InputError(f"{source} must have numbers, but has none")
    if len(lengths) > 1:
        raise InputError(f"rows must have one length, but {source} has rows of {min(lengths)} and of {max(lengths)}")
    values = tuple(value for found in rows for value in found)
    return Batch(values, (len(values),) if 1 in (len(rows), *lengths) else (len(rows), *lengths))


def _array(path: Path) -> Batch:
    try:
        import numpy as np
    except ImportError as error:
        raise MissingExtraError(".npy files need NumPy: pip install numpy") from error
    try:
        array = np.load(path, allow_pickle=False)
        values = tuple(array.astype(np.float64, casting="same_kind").ravel().tolist())
    except (ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} must be an array of real numbers in NumPy's format, but {error}") from error
    if not array.ndim or not values:
        raise InputError(f"{path} must have numbers along one axis or more, but its shape is {array.shape}")
    return Batch(values, array.shape)
