"""Assembles the page `learn.html` from the sources of this folder: modules, strings, styles. It loads nothing and works from a disk."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from html import escape
from importlib import resources
from importlib.resources.abc import Traversable
from posixpath import dirname, join, normpath
from typing import Any

LANGUAGES = ("en", "zh")
_DOCS = "https://github.com/batchnorm/batchnorm/blob/main/docs/learn.md"
_IMPORT = re.compile(r'^import \{([^}]*)\} from "([^"]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:const|class|function) (\w+))", re.MULTILINE)


def render(language: str = "en") -> str:
    """The page, which opens in a language; it has both."""
    tables = {each: strings(each) for each in LANGUAGES}
    frame, code = tables[language]["frame"], script()
    parts = {
        "lang": frame["lang"],
        "language": language,
        "digest": b64encode(sha256(code.encode()).digest()).decode(),
        "title": escape(frame["title"]),
        "css": _source("page.css"),
        "data": _json({"strings": tables, "findings": findings()}),
        "noscript": _without_script(tables[language]),
        "script": code,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], _source("page.html"))


def strings(language: str) -> dict[str, dict[str, str]]:
    """The strings of a language by part of the page (`frame`, or the id of a panel) and key."""
    return json.loads(_source(f"strings/{language}.json"))


def findings() -> dict[str, str]:
    """The panel that explains a finding of `diagnose`, by the code of its rule or a beginning of codes; the longest counts."""
    return json.loads(_source("findings.json"))


def panel_of(code: str) -> str:
    """The panel that explains a finding with this code."""
    table = findings()
    return table[max((each for each in table if code.startswith(each)), key=len)]


def panel_url(code: str) -> str:
    """The section of the documentation on the panel that explains a finding with this code."""
    return f"{_DOCS}#{anchor(strings('en')[panel_of(code)]['title'])}"


def anchor(heading: str) -> str:
    """What a heading of the documentation is called in a link."""
    return re.sub(r"\W+", "-", heading.lower()).strip("-")


def panels() -> list[str]:
    """The ids of the panels, in their order."""
    listed = re.search(r"PANELS = \[([^\]]*)\]", _source("panels/index.mjs"))
    assert listed is not None
    return re.findall(r"\w+", listed[1])


def script() -> str:
    """All modules as one script. Each is a function with its own names, called in the order in which they import each other."""
    done = dict[str, str]()
    _collect("main.mjs", done)
    return "\n".join(['"use strict";', "const modules = {};", *done.values()])


def _collect(path: str, done: dict[str, str]) -> None:
    """Add a module, after those that it imports."""
    text = _source(path)
    for _, target in _IMPORT.findall(text):
        there = normpath(join(dirname(path), target))
        if there not in done:
            _collect(there, done)

    def imported(line: re.Match[str]) -> str:
        names = line[1].replace(" as ", ": ").strip()
        return f'const {{ {names} }} = modules["{normpath(join(dirname(path), line[2]))}"];\n'

    exported = ", ".join(_EXPORT.findall(text))
    body = _EXPORT.sub("", _IMPORT.sub(imported, text))
    done[path] = f'modules["{path}"] = (() => {{\n{body}return {{ {exported} }};\n}})();'


def _without_script(table: dict[str, dict[str, str]]) -> str:
    """What readers without JavaScript get: the question and the sentence to keep of each panel."""

    def plain(text: str) -> str:
        return re.sub(r"[`*]", "", escape(text))

    def section(place: int, name: str) -> str:
        panel = table[name]
        text = (
            f"<h2>{place}. {plain(panel['title'])}</h2>\n<p>{plain(panel['guess'])}</p>\n<p>{plain(panel['keep'])}</p>"
        )
        return f'<section id="{name}">\n{text}\n</section>'

    frame = table["frame"]
    sections = [section(place, name) for place, name in enumerate(panels(), start=1)]
    return "\n".join([f"<h1>{escape(frame['title'])}</h1>", f"<p>{escape(frame['noscript'])}</p>", *sections])


def _json(data: Any) -> str:
    """JSON that is safe within a `<script>` element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _source(path: str) -> str:
    folder: Traversable = resources.files("batchnorm.learn")
    return folder.joinpath(*path.split("/")).read_text(encoding="utf-8")
