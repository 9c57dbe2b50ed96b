"""The frame of every page: self-contained HTML, light and dark, for every screen width; readable without its script too."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

from batchnorm.language import Language, spoken, tr

if TYPE_CHECKING:  # plots need an extra, and a page need not have any
    from batchnorm.report.chart import Chart
    from batchnorm.report.plots import Plot

PAGE = """<!doctype html>
<html lang="{lang}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
script-src 'sha256-{digest}'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<header>
<p class="kicker">{kicker}</p>
<h1>{title}</h1>
<p class="lead">{lead}</p>
</header>
<nav aria-label="{navigation}">
<ul>
{contents}
</ul>
</nav>
<main>
{body}
</main>
<footer>
<p class="note">{footer}</p>
</footer>
<script type="application/json" id="words">{words}</script>
<script>{script}</script>
</body>
</html>
"""


PAGE_LANGUAGES: dict[Language, str] = {"en": "en", "zh": "zh-Hans"}


class Section(NamedTuple):
    """A section of a page: its id, its heading, its content in HTML, and a short name for the contents, shown above the heading too."""

    id: str
    heading: str
    content: Sequence[str]
    name: str = ""

    def to_html(self) -> str:
        """The section as HTML."""
        kicker = f'<span class="kicker">{escape(self.name)}</span>' if self.name else ""
        heading = f"<h2>{kicker}{escape(self.heading)}</h2>"
        return "\n".join([f'<section id="{self.id}">', heading, *self.content, "</section>"])


def document(
    kicker: str,
    title: str,
    lead: str,
    sections: Sequence[Section],
    footer: str,
    scripts: Sequence[str] = ("page.js",),
) -> str:
    """A complete page of `sections`, with contents; the other arguments are plain text, and `scripts` files of this folder."""
    script = "".join(map(_resource, scripts))
    return PAGE.format(
        lang=PAGE_LANGUAGES[spoken()],
        navigation=tr("Contents"),
        words=json.dumps(_words(), ensure_ascii=False),
        kicker=escape(kicker),
        title=escape(title),
        css=_resource("page.css"),
        lead=escape(lead),
        contents="\n".join(
            f'<li><a href="#{each.id}">{escape(each.name or each.heading)}</a></li>' for each in sections
        ),
        body="\n".join(each.to_html() for each in sections),
        footer=escape(footer),
        script=script,
        digest=b64encode(sha256(script.encode()).digest()).decode(),
    )


def _words() -> dict[str, str]:
    """What the script says, by the names that it uses."""
    return {
        "values": tr("{title}: values by {axis}"),
        "key": tr("press an arrow key"),
        "range": tr("({low} to {high})"),
        "seed": tr("seed {seed}"),
        "show": tr("Show"),
        "lines": tr("Lines"),
        "mean": tr("mean and range"),
    }


def _resource(name: str) -> str:
    return resources.files("batchnorm.report").joinpath(name).read_text(encoding="utf-8")


def figures(items: Iterable[tuple[Plot | Chart, str, str]], prefix: str) -> str:
    """Numbered figures next to each other, each with a plot, a title and a caption in HTML; ids begin with `prefix`."""
    drawn = (
        f'<figure id="{prefix}figure-{number}">\n{plot.svg}<script type="application/json">{plot.data}</script>\n'
        f"<figcaption><strong>{escape(_caption(number, title))}</strong> {caption}</figcaption>\n</figure>"
        for number, (plot, title, caption) in enumerate(items, start=1)
    )
    return '<div class="figures">\n' + "\n".join(drawn) + "\n</div>"


def _caption(number: int, title: str) -> str:
    return tr("Figure {number}. {title}.", number=number, title=title)


def table(caption: str, columns: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    """An HTML table of plain text: labels of columns, and rows of a label and cells."""
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for label, cells in rows
    )
    # What scrolls takes the focus, so that the keyboard can scroll it.
    return (
        f'<div class="scroll" role="group" tabindex="0" aria-label="{escape(caption)}"><table>\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )
