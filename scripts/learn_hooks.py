"""Hook of mkdocs.yml: the page of `batchnorm learn` comes into the site, beside docs/learn.md, which links its panels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from batchnorm.learn.page import render

PANEL = re.compile(r"<!-- panel: (\w*) -->")
OPEN = {"en": "Open it here", "zh": "在这里打开"}
TOUCH = "touch.html"


def on_page_content(html: str, page: Any, config: Any, **_: Any) -> str:
    """Write the interactive page, and a link for each mark of a panel."""
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
