"""Plots as inline SVG that uses the fonts and colors of its page, and their data as JSON, with which `page.js` makes them answer.

Matplotlib draws with placeholder colors; they become CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count, product
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
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
# Characters of DejaVu Sans, matplotlib's font, that are one em wide and that no label has.
_EM_WIDE = "⊶⊷⋈⋉⋊⋋⋌⋮⋯⋰⋱⋲⋺⧏⧐⧑⧒⧓⧔⧕⨀⨁⨂"
_STAND_INS = dict[str, str]()
PLAIN_NUMBER = FuncFormatter(lambda value, _: f"{value:g}")


@dataclass(frozen=True)
class Series:
    """What a plot tells of one arm.

    Attributes:
        arm: the name under which it is switched on and off, together with the artists of `belongs`.
        label: what readers see.
        color: one of the placeholder colors.
        points: (x, y) where the plot answers. With `along` "x" the bounds of a band may follow; with "y" the value as text.
        dash: an SVG dash array; "" is solid.
        seeds: the points (x, y) of each seed.
    """

    arm: str
    label: str
    color: str
    points: Sequence[tuple[Any, ...]]
    dash: str = ""
    seeds: Sequence[Sequence[tuple[float, float]]] = ()

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON, with finite points only."""
        points, *seeds = ([_rounded(point) for point in line if _finite(point)] for line in (self.points, *self.seeds))
        return {"arm": self.arm, "label": self.label, "color": f"var({VARIABLES[self.color]})", "points": points} | {
            name: value for name, value in (("dash", self.dash), ("seeds", seeds)) if value
        }


@dataclass(frozen=True)
class Frame:
    """One of several states of a plot that a slider chooses: its value, its series, whether it is the drawn one, and a note to readers."""

    value: str
    series: Sequence[Series]
    drawn: bool
    note: str = ""


@dataclass(frozen=True)
class Answers:
    """The data of a plot: its title, the axis along which readers move from point to point, and its series.

    `slider` labels a slider over `frames`, of which one is drawn and has the series `series`. `rows` are the names of heights, for
    `along` "y".
    """

    title: str
    along: Literal["x", "y"]
    series: Sequence[Series]
    slider: str = ""
    frames: Sequence[Frame] = ()
    rows: Mapping[int, str] = field(default_factory=dict)

    def to_dict(self, axes: Axes) -> dict[str, Any]:
        """As plain data for JSON, with the ranges of the drawn axes as values and as coordinates of the SVG."""
        width, height = axes.get_figure(root=True).get_size_inches() * 72  # pyright: ignore[reportOptionalMemberAccess]
        box = axes.get_position()
        x = {"label": axes.get_xlabel(), "values": axes.get_xlim(), "log": axes.get_xscale() == "log"}
        y = {
            "label": axes.get_ylabel(),
            "values": axes.get_ylim(),
            "log": axes.get_yscale() == "log",
            "names": self.rows,
        }
        data = {
            "title": self.title,
            "along": self.along,
            "x": x | {"places": _rounded((box.x0 * width, box.x1 * width))},
            "y": y | {"places": _rounded(((1 - box.y0) * height, (1 - box.y1) * height))},
        }
        if not self.frames:
            return data | {"series": [one.to_dict() for one in self.series]}
        items = [
            {"value": frame.value, "note": frame.note, "series": [one.to_dict() for one in frame.series]}
            for frame in self.frames
        ]
        first = [frame.drawn for frame in self.frames].index(True)
        return data | {"frames": {"label": self.slider, "first": first, "items": items}}


def _rounded(values: Sequence[Any]) -> list[Any]:
    return [float(f"{value:.5g}") if isinstance(value, float) else value for value in values]


def _finite(point: Sequence[Any]) -> bool:
    return all(math.isfinite(value) for value in point if isinstance(value, float))


def drawable(text: str) -> str:
    """The text with Chinese in the stand-ins that `plot` replaces by it again.

    Few machines have a font for matplotlib with Chinese characters, but every browser has. Each character is an em wide, as are the
    stand-ins in matplotlib's own font, so the layout is right on every machine.
    """
    return re.sub(r"[\u2e80-\u9fff\uff00-\uffef\u3000-\u303f]+", lambda found: _stand_in(found[0]), text)


@cache
def _stand_in(text: str) -> str:
    """As many characters as the text has, which stand for no other text."""
    candidates = (stand_in for size in count(len(text)) for stand_in in product(_EM_WIDE, repeat=size))
    taken = next(found for stand_in in candidates if (found := "".join(stand_in)) not in _STAND_INS)
    _STAND_INS[taken] = text
    return taken


def _restored(text: str) -> str:
    return re.sub(f"[{_EM_WIDE}]+", lambda found: _STAND_INS.get(found[0], found[0]), text)


class Plot(NamedTuple):
    """A drawn plot: its `<svg>` element, and its data as JSON that is safe within a `<script>` element."""

    svg: str
    data: str


def belongs(artist: Artist, arm: str, kind: Literal["line", "legend"] = "line") -> None:
    """Mark an artist as drawn for an arm, so that it is switched with the arm's `Series`."""
    artist.set_gid(f"{kind}:{html.escape(arm)}")


def plot(
    name: str, description: str, draw: Callable[[Figure], Axes], size: tuple[float, float], answers: Answers
) -> Plot:
    """Run `draw` on an empty figure of this size in inches of 72 units, and return it with the data of its axes.

    The `<svg>` element has no fonts, colors and links of its own. `name` makes the ids within the plot unique on its page.
    """
    name = re.sub(r"\W", "-", name)
    with mpl.rc_context(STYLE), mpl.rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        axes = draw(figure)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # inline SVG needs no XML declaration, doctype and namespaces
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="(line|legend):', r'data-\1="', svg)  # `belongs`
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # several plots share one page
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)  # it would style the page
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*|font-family: [^;\"]*;", _size_only, svg)  # use the font of the page
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    opening = f'<svg role="img" aria-label="{html.escape(description)}" '
    svg = re.sub(r"<svg [^>]*?(?=viewBox)", lambda _: opening, svg, count=1)  # no width and height: the page decides
    data = json.dumps(answers.to_dict(axes), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Plot(_restored(svg), _restored(data).replace("<", "\\u003c"))


def _size_only(font: re.Match[str]) -> str:
    """Keep only the font size; older versions of matplotlib write it and the family in one property."""
    return f"font-size: {font[1]}" if font[1] else ""
