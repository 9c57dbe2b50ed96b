"""What the theme's pages would ask of other hosts, or say on the console from a disk, is taken out of them (a hook in mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

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
