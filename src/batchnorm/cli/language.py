"""The option `--lang`, for the whole command line and for each command that has translations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from batchnorm.language import LANGUAGES, preferred, speaking


def _speak(ctx: click.Context, _: click.Parameter, language: Any) -> None:
    if language is not None:
        ctx.with_resource(speaking(language))
    elif ctx.parent is None and _can_show(asked := preferred()):
        ctx.with_resource(speaking(asked))


def _can_show(language: str) -> bool:
    """Whether stdout can encode a language that was not asked for by an option."""
    try:
        "\u4e2d".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return language == "en"
    return True


lang_option: Callable[[Any], Any] = click.option(
    "--lang",
    type=click.Choice(LANGUAGES),
    callback=_speak,
    expose_value=False,
    is_eager=True,
    help="Language of what is printed and written.  [default: BATCHNORM_LANG, or the locale's]",
)
