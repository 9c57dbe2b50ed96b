"""Writes what the code knows of the rules into docs/diagnose/: the table of the index, and the head of each rule's page.

Run it when a rule or a threshold changes. The examples below the heads are written by hand; with --run it also writes anew what they print.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from batchnorm.diagnostics import FAMILIES, RULES, Rule, thresholds
from batchnorm.learn.page import anchor, panel_of, strings

FOLDER = Path(__file__).parent.parent / "docs" / "diagnose"
INDEX = FOLDER / "index.md"
OTHERS = [FOLDER.parent / name for name in ("diagnose.md", "diagnose-gallery.md")]  # whose examples it runs too
BEGIN, END = "<!-- rule: written by scripts/diagnose_page.py -->\n", "<!-- end of rule -->\n"
MEASURED = re.compile(r"(?<=\.) (?=(?:Measured|Found|Reported|Above|Below|From|With a loader|The share)\b)")
EXAMPLE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def page_of(rule: Rule) -> Path:
    """The page of a rule."""
    return FOLDER / f"{rule.code}.md"


def page(text: str, rule: Rule | None = None) -> str:
    """The text of a page, or of the index, with the rules as they are now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + (table() if rule is None else head(rule)) + END + after


def table() -> str:
    """All rules, in Markdown."""
    lines = list[str]()
    for digit, family in FAMILIES.items():
        lines += ["", f"## BN{digit}: {family}", "", "| code | severity | needs | finds |", "|---|---|---|---|"]
        lines += [
            f"| [{rule.code}]({rule.code}.md) | {rule.severity} | {needs(rule)} | {rule.title} |"
            for rule in RULES
            if rule.code[2] == digit
        ]
    return "\n".join([*lines, "", ""])


def needs(rule: Rule) -> str:
    """The arguments that a rule needs."""
    return ", ".join(" or ".join(f"`{name}`" for name in need.split("|")) for need in rule.needs) or "–"


def head(rule: Rule) -> str:
    """What a rule finds, why that matters, what mends it, and its thresholds."""
    why, *measured = MEASURED.split(re.sub(r"(?<![`\w])([*_<])", r"\\\1", rule.why), maxsplit=1)
    lines = [
        f"# {rule.code}: {rule.title}",
        "",
        "| severity | family | needs | `fix` mends it |",
        "|---|---|---|---|",
        f"| {rule.severity} | [{FAMILIES[rule.code[2]]}](index.md) | {needs(rule)} | {'yes' if rule.fixable else 'no'} |",
        "",
        why,
        "",
        "With this library:" if rule.with_torch != rule.remedy else "With this library or torch alone:",
        "",
        f"    {rule.remedy}",
    ]
    if rule.with_torch != rule.remedy:
        lines += ["", "With torch alone:", "", f"    {rule.with_torch}"]
    panel = strings("en")[panel_of(rule.code)]["title"]
    lines += ["", f"To see it: [{panel}](../learn.md#{anchor(panel)})."]
    lines += ["", "## How it is measured", "", *(f"{sentences}\n" for sentences in measured)]
    known = comments()
    rows = [
        f"| `{name}` | {getattr(thresholds, name):g} | {known[name] or 'as above'} |"
        for name in thresholds_of(rule.find)
    ]
    if rows:
        lines += ["| threshold | value | where it lies |", "|---|---|---|", *rows]
    else:
        lines += ["There is no threshold."]
    return "\n".join([*lines, "", ""])


def thresholds_of(function: Callable[..., Any]) -> list[str]:
    """The thresholds that a rule reads, also in the functions of its file that it calls, in the order of thresholds.py."""
    seen, names = set[types.FunctionType](), set[str]()

    def visit(called: Any) -> None:
        if not isinstance(called, types.FunctionType) or called in seen or called.__module__ != function.__module__:
            return
        seen.add(called)
        for name in _names(called.__code__):
            names.add(name)
            visit(called.__globals__.get(name))

    visit(function)
    return [name for name in comments() if name in names]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def comments() -> dict[str, str]:
    """What thresholds.py says of each threshold."""
    source = Path(thresholds.__file__ or "").read_text()
    lines = source.splitlines()
    found = dict[str, str]()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = " ".join(lines[node.lineno - 1 : node.end_lineno])
            found[node.targets[0].id] = text.partition("#")[2].removesuffix(")").strip()
    return found


def run(text: str, name: str) -> str:
    """A page with what its examples print."""
    namespace: dict[str, Any] = {"__name__": "docs"}

    def example(found: re.Match[str]) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(found[1], name, "exec"), namespace)
        block = f"```python\n{found[1]}```\n"
        return block if found[2] is None else f"{block}\n```text\n{out.getvalue().strip()}\n```\n"

    return EXAMPLE.sub(example, text)


def main() -> None:
    """Write all pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="write anew what the examples print")
    parser.add_argument("codes", nargs="*", help="pages to write, such as BN201 (default: all)")
    given = parser.parse_args()
    if not given.codes:
        INDEX.write_text(page(INDEX.read_text()))
    for rule in RULES:
        if not given.codes or rule.code in given.codes:
            path = page_of(rule)
            text = page(path.read_text(), rule)
            path.write_text(run(text, path.name) if given.run else text)
    for path in OTHERS if given.run and not given.codes else ():
        path.write_text(run(path.read_text(), path.name))


if __name__ == "__main__":
    main()
