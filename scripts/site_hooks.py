"""Hooks of mkdocs.yml: what the theme's pages would ask of other hosts, or say on the console from a disk, is taken out of them, and the
page of `batchnorm learn` comes into the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

from batchnorm.learn.page import render

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
SEARCH = {"en": "Search", "zh": "搜索"}
PANEL = re.compile(r"<!-- panel: (\w*) -->")
OPEN = {"en": "Open it here", "zh": "在这里打开"}
TOUCH = "touch.html"


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001  # mkdocs passes names
    """Write the interactive page beside docs/learn.md, and link its panels."""
    if not PANEL.search(html):
        return html
    language = config.theme["language"]
    target = Path(config.site_dir, page.file.dest_uri).with_name(TOUCH)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(language), encoding="utf-8")

    def link(panel: re.Match[str]) -> str:
        fragment = f"#{panel[1]}" if panel[1] else ""
        return f'<a href="{TOUCH}{fragment}">{OPEN[language]}</a>'

    return PANEL.sub(link, html)


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
