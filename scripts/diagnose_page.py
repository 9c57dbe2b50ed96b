"""Writes the rules into docs/diagnose.md: a table, and a section for each rule. Run it when a rule changes."""

from __future__ import annotations

import re
from pathlib import Path

from batchnorm.diagnostics import FAMILIES, RULES, Rule
from batchnorm.learn.page import anchor, panel_of, strings

PAGE = Path(__file__).parent.parent / "docs" / "diagnose.md"
BEGIN, END = "<!-- rules: written by scripts/diagnose_page.py -->\n", "<!-- end of rules -->\n"


def page(text: str) -> str:
    """The text of the page with the rules as they are now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + rules() + END + after


def rules() -> str:
    """The table and the sections of all rules, in Markdown."""
    lines = ["", "| code | severity | needs | finds |", "|---|---|---|---|"]
    lines += [
        f"| [{rule.code}](#{rule.code.lower()}) | {rule.severity} | {needs(rule)} | {rule.title} |" for rule in RULES
    ]
    for digit, family in FAMILIES.items():
        lines += ["", f"## BN{digit}: {family}"]
        lines += [line for rule in RULES if rule.code[2] == digit for line in section(rule)]
    return "\n".join([*lines, "", ""])


def needs(rule: Rule) -> str:
    """The arguments that a rule needs."""
    return ", ".join(" or ".join(f"`{name}`" for name in need.split("|")) for need in rule.needs) or "–"


def section(rule: Rule) -> list[str]:
    """What a rule finds, and what mends it."""
    mended = " `fix` mends it." if rule.fixable else ""
    what = re.sub(r"(?<![`\w])([*_<])", r"\\\1", rule.why)
    title = f"**{rule.title[0].upper()}{rule.title[1:]}** ({rule.severity})."
    panel = strings("en")[panel_of(rule.code)]["title"]
    seen = f"To see it: [{panel}](learn.md#{anchor(panel)})."
    lines = ["", f"### {rule.code}", "", f"{title} {what}{mended} {seen}", "", f"    {rule.remedy}"]
    if rule.with_torch != rule.remedy:
        lines += ["", "With torch alone:", "", f"    {rule.with_torch}"]
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
