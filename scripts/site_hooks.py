"""Hooks of mkdocs.yml: the chapters of the book, and pages that ask no other host and say nothing on the console from a disk.

docs/tutorial/NAME.md and docs/zh/NAME.md are one chapter in two languages. The Chinese site shows the latter in place of the former, so
that both have the same address below their language, and links and the switch of languages lead from one to the other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority

CHANGES = (
    # The theme asks GitHub for the number of stars.
    (' data-md-component="source"', ""),
    # Without an address of the site these are relative, and the theme reads sitemap.xml for each, which a browser refuses from a disk.
    (r'<link rel="alternate" [^>]*>', ""),
    # A dialog needs a name for screen readers.
    ('data-md-component="search" role="dialog"', r'\g<0> aria-label="{search}"'),
)
BREAKS = re.compile(r'(?<=[\w)])([._=(,/]+)(?=[\w"&])')  # where a name in a narrow table may go on in the next line
CELL_CODE = re.compile(r"(<code>)([^<]*)(?=</code>)")
CHAPTERS = "tutorial/"
SEARCH = {"en": "Search", "zh": "搜索"}


def on_config(config: Any) -> Any:
    """The navigation with the chapters instead of their folder."""
    for section in config.nav:
        for pages in section.values():
            for page in pages if isinstance(pages, list) else ():
                if isinstance(page, dict) and page.get("Book") == CHAPTERS:
                    page["Book"] = sorted(CHAPTERS + path.name for path in Path(config.docs_dir, CHAPTERS).glob("*.md"))
    return config


@event_priority(-200)  # after i18n, which knows suffixes alone
def on_files(files: Any, config: Any) -> Any:
    """The files, those of the Chinese chapters in place of the English ones."""
    if config.theme["language"] == "zh":
        for file in files.documentation_pages():
            if file.src_uri.startswith(CHAPTERS):
                file.abs_src_path = str(Path(config.docs_dir, "zh", file.name + ".md"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text, with the chapters where the site has them: on GitHub a Chinese page links docs/zh."""
    return markdown.replace("](zh/", f"]({CHAPTERS}") if page.file.src_uri.endswith(".zh.md") else markdown


def on_post_page(output: str, page: Any, config: Any) -> str:
    """The page without them.

    Raises:
        PluginError: the theme no longer writes one of them.
    """
    for pattern, replacement in CHANGES:
        output, found = re.subn(pattern, replacement.format(search=SEARCH[config.theme["language"]]), output)
        if not found and not pattern.startswith("<link"):  # a single language has no alternate
            raise PluginError(
                f"{page.file.src_uri} must contain {pattern}, which scripts/site_hooks.py replaces, but does not; adapt it to the theme"
            )
    return re.sub(r"<td.*?</td>", _breakable, output, flags=re.DOTALL)


def _breakable(cell: re.Match[str]) -> str:
    """A cell of a table in which names in code may be broken."""
    return CELL_CODE.sub(lambda code: code[1] + BREAKS.sub(r"\1<wbr>", code[2]), cell[0])
