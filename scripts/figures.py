"""Draws the figures of the book that need no measurement, with symbols instead of words: `python scripts/figures.py`."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, pi, sqrt
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "docs" / "assets"
STYLE = """
svg { --paper: #fdfdfb; --ink: #1d1f21; --muted: #5c6166; --grid: #dcdcd6; --blue: #0a5c9c; --orange: #a84a08; --green: #1b7f4d; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #1b1e22; --ink: #e8e6e1; --muted: #a8acb0; --grid: #363a3f; --blue: #6cb8f2; --orange: #f0a35c; --green: #67c995; }
}
text { font: 17px system-ui, sans-serif; fill: var(--ink); text-anchor: middle; }
.small { font-size: 14px; fill: var(--muted); }
.bold { font-weight: 600; }
.cell { fill: var(--paper); stroke: var(--muted); }
.shared { fill: var(--blue); }
.node { fill: var(--paper); stroke: var(--ink); stroke-width: 1.5; }
.path { fill: none; stroke-width: 3; }
.blue { stroke: var(--blue); fill: none; }
.orange { stroke: var(--orange); fill: none; }
.green { stroke: var(--green); fill: none; }
.fill { fill: var(--blue); opacity: 0.25; }
.old { fill: var(--grid); }
.thin { fill: none; stroke: var(--muted); stroke-dasharray: 5 4; stroke-width: 1.5; }
"""

SAMPLES, CHANNELS, CELL = 4, 6, 18  # GN: groups of two channels
SHARED = {
    "BN": [(n, 0) for n in range(SAMPLES)],
    "LN": [(0, c) for c in range(CHANNELS)],
    "IN": [(0, 0)],
    "GN": [(0, 0), (0, 1)],
}


def svg(width: int, height: int, label: str, parts: list[str]) -> str:
    """A drawing on paper."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">',
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{height}" fill="var(--paper)"/>',
            *parts,
            "</svg>\n",
        ]
    )


def axes() -> str:
    """Which values share their statistics in four normalizations."""
    parts, panel, top = [], CELL * CHANNELS + 32, 40
    for number, (name, shared) in enumerate(SHARED.items()):
        left = 30 + number * panel
        parts.append(f'<text class="bold" x="{left + CELL * CHANNELS / 2:g}" y="26">{name}</text>')
        for n in range(SAMPLES):
            for c in range(CHANNELS):
                kind = "cell shared" if (n, c) in shared else "cell"
                place = f'x="{left + c * CELL}" y="{top + n * CELL}" width="{CELL}" height="{CELL}"'
                parts.append(f'<rect class="{kind}" {place}/>')
        bottom = top + SAMPLES * CELL
        parts.append(f'<text class="small" x="{left + CELL * CHANNELS / 2:g}" y="{bottom + 18}">C</text>')
        parts.append(f'<text class="small" x="{left - 12}" y="{top + SAMPLES * CELL / 2 + 5:g}">N</text>')
    label = "N by C cells: BN shares a column, LN a row, IN a cell, GN some cells of a row."
    return svg(20 + len(SHARED) * panel, top + SAMPLES * CELL + 30, label, parts)


def paths() -> str:
    """The three ways from x to the normalized value, which the gradient takes back."""
    nodes = {"x": (60, 120), "σ²": (260, 40), "µ": (260, 200), "x̂": (460, 120)}
    lines = (
        ("blue path", "M86 120H434"),
        ("orange path", "M80 103L236 49M284 49L440 103"),
        ("green path", "M80 137L236 191M284 191L440 137"),
        ("thin", "M260 174V66"),
    )
    parts = [f'<path class="{kind}" d="{line}"/>' for kind, line in lines]
    for name, (x, y) in nodes.items():
        parts += [f'<circle class="node" cx="{x}" cy="{y}" r="25"/>', f'<text x="{x}" y="{y + 6}">{name}</text>']
    parts += [
        f'<text class="bold" x="{x}" y="{y}">{name}</text>'
        for name, x, y in (("a", 170, 113), ("b", 152, 62), ("c", 152, 190))
    ]
    label = "From x to the normalized value: directly (a), through the variance (b), through the mean (c)."
    return svg(520, 240, label, parts)


PEAKS = ((0.7, -4.0), (0.3, 4.0))  # weight and center of two Gaussians of variance 1
MEAN = sum(weight * center for weight, center in PEAKS)
DEVIATION = sqrt(1 + sum(weight * (center - MEAN) ** 2 for weight, center in PEAKS))


def gaussian(x: float) -> float:
    """The standard normal density."""
    return exp(-x * x / 2) / sqrt(2 * pi)


def two_peaks(x: float) -> float:
    """The density of a mixture of Gaussians."""
    return sum(weight * gaussian(x - center) for weight, center in PEAKS)


def normalized_peaks(x: float) -> float:
    """The density of the normalized mixture."""
    return DEVIATION * two_peaks(MEAN + DEVIATION * x)


def curve(density: Callable[[float], float], left: int, reach: float, height: float) -> str:
    """The outline of a density from -reach to reach, over 240 units of width; `height` is that of a density of 1."""
    points = [(left + 2 * step, density(reach * (step / 60 - 1))) for step in range(121)]
    return "M" + "L".join(f"{x} {170 - height * y:.1f}" for x, y in points)


def shape() -> str:
    """A distribution before and after normalization, which keeps its shape, beside a standard normal one."""
    parts = []
    for left, name, reach, height, density in (
        (30, "x", 10.0, 420, two_peaks),
        (310, "x̂", 10.0 / DEVIATION, 420 / DEVIATION, normalized_peaks),
    ):
        line = curve(density, left, reach, height)
        parts += [
            f'<path class="fill" d="{line}L{left + 240} 170L{left} 170Z"/>',
            f'<path class="path blue" d="{line}"/>',
            f'<path class="thin" style="stroke-dasharray: none" d="M{left} 170H{left + 240}"/>',
            f'<text class="bold" x="{left + 120}" y="26">{name}</text>',
        ]
        for tick in (-8, -4, 0, 4, 8) if name == "x" else (-2, -1, 0, 1, 2):
            place = left + 120 * (1 + tick / reach)
            parts.append(f'<text class="small" x="{place:.1f}" y="190">{str(tick).replace("-", "−")}</text>')
    parts.append(f'<path class="thin" d="{curve(gaussian, 310, 10.0 / DEVIATION, 420 / DEVIATION)}"/>')
    parts.append('<text class="small" x="490" y="60">N(0, 1)</text>')
    label = "Two peaks, before and after normalization: the same shape on another scale, not that of N(0, 1)."
    return svg(580, 200, label, parts)


def momentum() -> str:
    """The weights of the last 44 batches in a running average of momentum 0.1."""
    parts, bottom = [], 170
    for age in range(44):
        weight = 0.1 * 0.9**age
        kind = "shared" if age < 10 else "old"
        size = f'width="9" height="{1300 * weight:.1f}"'
        parts.append(f'<rect class="{kind}" x="{520 - 11 * age}" y="{bottom - 1300 * weight:.1f}" {size}/>')
    for age in (0, 9, 21, 43):
        parts.append(f'<text class="small" x="{524.5 - 11 * age}" y="{bottom + 18}">{age + 1}</text>')
    parts += [
        f'<text class="bold" x="380" y="80">1 − 0.9¹⁰ = {1 - 0.9**10:.0%}</text>',
        f'<text class="small" x="190" y="130">0.9¹⁰ = {0.9**10:.0%}</text>',
    ]
    label = "Weights 0.1, 0.09, 0.081 and so on; the last ten batches have 65% of the weight."
    return svg(560, 200, label, parts)


DRAWINGS = {"axes.svg": axes, "paths.svg": paths, "shape.svg": shape, "momentum.svg": momentum}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (ASSETS / name).write_text(draw())
        print("Wrote", ASSETS / name)
