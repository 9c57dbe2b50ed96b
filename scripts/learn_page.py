"""Writes the panels into docs/learn.md and docs/learn.zh.md, a section for each. Run it when a panel or its strings change."""

from __future__ import annotations

from pathlib import Path

from batchnorm.learn.page import LANGUAGES, anchor, panels, strings

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"en": DOCS / "learn.md", "zh": DOCS / "learn.zh.md"}
BEGIN, END = "<!-- panels: written by scripts/learn_page.py -->\n", "<!-- end of panels -->\n"


def page(text: str, language: str) -> str:
    """The text of the page with the panels as they are now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "".join(map(section, strings_of(language))) + END + after


def strings_of(language: str) -> list[dict[str, str]]:
    """The strings of each panel, with its id, and with the anchor of the English page where that is not the heading's."""
    titles = {panel: strings("en")[panel]["title"] for panel in panels()}
    names = {panel: "" if language == "en" else f'<a id="{anchor(title)}"></a>\n\n' for panel, title in titles.items()}
    return [{"id": panel, "anchor": names[panel], **strings(language)[panel]} for panel in panels()]


def section(panel: dict[str, str]) -> str:
    """What a panel asks, and the sentence to keep; scripts/learn_hooks.py adds the link to the panel."""
    return (
        f"\n{panel['anchor']}### {panel['title']}\n\n{panel['guess']}\n\n*{panel['keep']}*\n\n"
        f"`batchnorm learn --panel {panel['id']}` <!-- panel: {panel['id']} -->\n"
    )


if __name__ == "__main__":
    for language in LANGUAGES:
        PAGES[language].write_text(page(PAGES[language].read_text(), language))
