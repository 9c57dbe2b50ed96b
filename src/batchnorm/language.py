"""The language of what the package says to people: English, or Chinese by a catalog of translated strings.

Strings stand in the code in English. `tr` translates one where it is printed; `marked` marks one that is translated later. The catalog
`translations/zh/` maps them to Chinese. What programs read, such as JSON, names and errors, stays English.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import resources
from typing import Literal, cast, get_args

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
VARIABLE = "BATCHNORM_LANG"
_LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set wins, as POSIX has it

_INDENT = "    "
# What a line may not be broken within: a word with its space, or a wide character with the punctuation around it.
_PIECE = re.compile(r"[《“(（]*(?:[\u2e80-\uffef]|[^\s\u2e80-\uffef]+)[，。、；：！？》”）]*\s*")

_spoken: ContextVar[Language] = ContextVar("spoken", default="en")


@contextmanager
def speaking(language: Language) -> Iterator[None]:
    """Translate into this language within the context."""
    token = _spoken.set(language)
    try:
        yield
    finally:
        _spoken.reset(token)


def spoken() -> Language:
    """The language of the context; English outside of any."""
    return _spoken.get()


def preferred(environment: Mapping[str, str] = os.environ) -> Language:
    """The language that the environment asks for: by BATCHNORM_LANG, or by its locale."""
    locale = next((environment[name] for name in _LOCALE if environment.get(name)), "")
    asked = environment.get(VARIABLE) or locale
    return "zh" if asked.lower().startswith("zh") else "en"


def marked(text: str) -> str:
    """The text itself; it is in the catalog, for a `tr` elsewhere."""
    return text


def tr(text: str, **values: object) -> str:
    """The text in the language of the context, with `values` in place of its {names}; English if the catalog does not have it."""
    translated = text if spoken() == "en" else catalog(spoken()).get(text, text)
    return translated.format(**values) if values else translated


@cache
def catalog(language: Language) -> dict[str, str]:
    """Translations by their English strings."""
    files = resources.files("batchnorm").joinpath("translations", language).iterdir()
    found = dict[str, str]()
    for file in sorted(files, key=lambda each: each.name):
        found |= cast("dict[str, str]", json.loads(file.read_text(encoding="utf-8")))
    return found


def text_width(text: str) -> int:
    """Width on a terminal: a Chinese character takes two columns, the hat of x̂ none."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    return 0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")


def wrapped(text: str, width: int, indent: str = _INDENT) -> list[str]:
    """The text in lines of this many columns; further lines are indented."""
    if text_width(text) == sum(unicodedata.combining(character) == 0 for character in text):
        return textwrap.wrap(text, width, subsequent_indent=indent)
    lines = [""]
    for piece in _PIECE.findall(text):
        if lines[-1].strip() and text_width(lines[-1]) + text_width(piece.rstrip()) > width:
            lines.append(indent)
        lines[-1] += piece
    return [line.rstrip() for line in lines]
