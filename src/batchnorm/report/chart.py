"""Line charts as inline SVG, written without matplotlib, which is an extra. `page.js` makes them answer, as it does the plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

_WIDTH, _HEIGHT = 432, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 424, 34, 206  # of the axes
_MOST_DOTS = 60  # more points than these are a line alone
_MOST_TICKS = 6


class Chart(NamedTuple):
    """A drawn chart: its `<svg>` element, and its data as JSON that is safe within a `<script>` element."""

    svg: str
    data: str


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        arm: a name for switching it on and off.
        label: what readers see.
        color: a CSS color.
        points: (place on the x axis, value above 0).
    """

    arm: str
    label: str
    color: str
    points: Sequence[tuple[int, float]]


def log_chart(
    title: str, x_label: str, y_label: str, names: Sequence[str], lines: Sequence[Line], levels: Sequence[float] = ()
) -> Chart:
    """Values of named places, such as layers, on a logarithmic axis; `levels` are horizontal lines, such as thresholds."""
    values = [value for line in lines for _, value in line.points] + list(levels)
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    last = max(len(names) - 1, 1)

    def across(place: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * place / last

    def up(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (math.log10(value) - low) / (high - low)

    said = f"{title}. " + "; ".join(f"{line.label}: {_extent(line.points, names)}" for line in lines) + "."
    drawn = [f'<svg role="img" aria-label="{escape(said)}" viewBox="0 0 {_WIDTH} {_HEIGHT}">']
    for exponent in range(low, high + 1, math.ceil((high - low + 1) / _MOST_TICKS)):
        y = up(10.0**exponent)
        drawn.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="var(--grid)" stroke-width="0.6"/>')
        drawn.append(_text(_LEFT - 7, y + 4, _power(exponent), "end"))
    for place in sorted({round(last * share / 4) for share in range(5)} & set(range(len(names)))):
        drawn.append(_text(across(place), _BOTTOM + 17, str(place + 1), "middle"))
    drawn.append(_text((_LEFT + _RIGHT) / 2, _HEIGHT - 6, x_label, "middle"))
    drawn.append(f'<text x="8" y="14" font-size="11" fill="var(--muted)">{escape(y_label)}</text>')
    for level in levels:
        dashes = 'stroke="var(--muted)" stroke-width="0.8" stroke-dasharray="1 2"'
        drawn.append(f'<path d="M{_LEFT} {up(level):.1f}H{_RIGHT}" {dashes}/>')
    for number, line in enumerate(lines):
        arm, style = escape(line.arm), f'style="color: {line.color}"'
        places = [f"{across(x):.1f},{up(y):.1f}" for x, y in line.points]
        drawn.append(f'<g data-line="{arm}" {style}>')
        drawn.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="currentColor" stroke-width="1.6"/>')
        if len(places) <= _MOST_DOTS:
            drawn += [
                f'<circle cx="{place.partition(",")[0]}" cy="{place.partition(",")[2]}" r="2.6" fill="currentColor"/>'
                for place in places
            ]
        drawn.append("</g>")
        if len(lines) > 1:
            x = _RIGHT - 150 * (len(lines) - number - 1)
            drawn.append(
                f'<text data-legend="{arm}" x="{x}" y="14" font-size="11" text-anchor="end" {style} fill="currentColor">'
                f"● {escape(line.label)}</text>"
            )
    axes = {
        "x": {
            "label": x_label,
            "values": [0, last],
            "log": False,
            "places": [_LEFT, _RIGHT],
            "names": [f"{place + 1}: {name}" for place, name in enumerate(names)],
        },
        "y": {"label": y_label, "values": [10.0**low, 10.0**high], "log": True, "places": [_BOTTOM, _TOP]},
    }
    series = [
        {
            "arm": line.arm,
            "label": line.label,
            "color": line.color,
            "points": [[place, float(f"{value:.4g}")] for place, value in line.points],
        }
        for line in lines
    ]
    return Chart("\n".join([*drawn, "</svg>"]), safe_json({"title": title, "along": "x", **axes, "series": series}))


def safe_json(data: Any) -> str:
    """JSON for a `<script>` element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _extent(points: Sequence[tuple[int, float]], names: Sequence[str]) -> str:
    """The largest value and where it is."""
    place, value = max(points, key=lambda point: point[1])
    return f"largest {value:.3g} at {names[place]}"


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 4 else f"1e{exponent}"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="{anchor}" fill="var(--muted)">{escape(text)}</text>'
    )
