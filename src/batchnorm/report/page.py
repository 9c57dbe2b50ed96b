"""The frame of every page: self-contained HTML without scripts, light and dark, for every screen width."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib import resources

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
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
<main>
{body}
</main>
<footer>
<p class="note">{footer}</p>
</footer>
</body>
</html>
"""


def document(kicker: str, title: str, lead: str, body: Iterable[str], footer: str) -> str:
    """A complete page around `body`, sections in HTML; the other arguments are plain text."""
    return PAGE.format(
        kicker=escape(kicker),
        title=escape(title),
        css=resources.files("batchnorm.report").joinpath("page.css").read_text(encoding="utf-8"),
        lead=escape(lead),
        body="\n".join(body),
        footer=escape(footer),
    )


def section(heading: str, *content: str) -> str:
    """A section with a heading and its HTML content."""
    return "\n".join(["<section>", f"<h2>{heading}</h2>", *content, "</section>"])


def table(caption: str, columns: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    """An HTML table of plain text: labels of columns, and rows of a label and cells."""
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for label, cells in rows
    )
    return (
        f'<div class="scroll"><table>\n<caption>{escape(caption)}</caption>\n<thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )
