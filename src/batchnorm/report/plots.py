"""Plots as inline SVG that uses the fonts and colors of its page.

Matplotlib draws with placeholder colors; they become CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK, MUTED, GRID, PLAIN, BATCH_NORM = "#010101", "#020202", "#030303", "#040404", "#050505"
MORE = ("#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PLAIN: "--plain", BATCH_NORM: "--batch-norm"}
VARIABLES |= {color: f"--series-{number}" for number, color in enumerate(MORE, start=3)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
PLAIN_NUMBER = FuncFormatter(lambda value, _: f"{value:g}")


def inline_svg(name: str, description: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    """Run `draw` on an empty figure of this size in inches of 72 units; return its `<svg>` element, without fonts, colors and links.

    `name` makes the ids within the plot unique on its page.
    """
    name = re.sub(r"\W", "-", name)
    with mpl.rc_context(STYLE), mpl.rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # inline SVG needs no XML declaration, doctype and namespaces
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # several plots share one page
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*|font-family: [^;\"]*;", _size_only, svg)  # use the font of the page
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    opening = f'<svg role="img" aria-label="{html.escape(description)}" '
    return re.sub(r"<svg [^>]*?(?=viewBox)", lambda _: opening, svg, count=1)  # no width and height: the page decides


def _size_only(font: re.Match[str]) -> str:
    """Keep only the font size; older versions of matplotlib write it and the family in one property."""
    return f"font-size: {font[1]}" if font[1] else ""
