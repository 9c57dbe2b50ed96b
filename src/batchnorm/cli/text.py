"""Prints text from models, files and exceptions on any terminal: escapes control characters, and replaces what a stream cannot encode."""

from __future__ import annotations

import codecs
import io
import json
import sys
import unicodedata
from typing import Any

import click

from batchnorm.files import to_json

_ERRORS = "batchnorm"
_PLAIN = str.maketrans(
    {
        "–": "-",
        "×": "x",
        "±": "+-",
        "→": "->",
        "·": "*",
        "≈": "~",
        "…": "...",
        "\u00a0": " ",
        "≤": "<=",
        "≥": ">=",
        "√": "sqrt",
        "½": "1/2",
    }
    | {
        "ε": "eps",
        "µ": "mu",
        "σ": "sigma",
        "Σ": "sum",
        "γ": "gamma",
        "β": "beta",
        "²": "^2",
        "ᵢ": "_i",
        "₁": "_1",
        "\u0302": "_hat",
    }
)
ONE_LINE = 1000  # maximum number of characters of an error


def visible(text: str, keep: str = "") -> str:
    """The text with control and other unprintable characters escaped, except those in `keep`."""
    return "".join(c if _is_visible(c) or c in keep else c.encode("unicode_escape").decode() for c in text)


def _is_visible(character: str) -> bool:
    """Whether a character is printable or a space, and neither ends a line nor controls the terminal."""
    return character.isprintable() or unicodedata.category(character) == "Zs"


def one_line(error: BaseException) -> str:
    """The message of an exception as one line of visible characters, shortened if it is very long."""
    text = visible(" ".join(str(error).split()))
    return text if len(text) <= ONE_LINE else f"{text[: ONE_LINE - 4]} ..."


def print_json(data: Any) -> None:
    """Print strict JSON on stdout; characters that stdout cannot encode become JSON escapes."""
    text = to_json(data)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data, allow_nan=False) + "\n"
    click.echo(text, nl=False)


def accept_any_text() -> None:
    """Make stdout replace characters that it cannot encode, such as an arrow by ->, instead of raising."""
    codecs.register_error(_ERRORS, _replacement)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors=_ERRORS)


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end
