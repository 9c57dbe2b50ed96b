"""Draws the picture of the README and of the site's front pages, from the demonstration's measurements: `python scripts/picture.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import log10
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "lab" / "demo.json"
ASSETS = ROOT / "docs" / "assets"
STEPS = 100  # later both networks are level

WIDTH, HEIGHT, LEFT, TOP, GAP, PANEL, DEEP = 640, 310, 58, 66, 72, 244, 180
ARMS = (("plain", "6 4"), ("batch_norm", "none"))  # name, and dashes of the line
STYLE = """
svg { --paper: #fdfdfb; --ink: #1d1f21; --muted: #5c6166; --grid: #dcdcd6; --plain: #a84a08; --batch_norm: #0a5c9c; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #1b1e22; --ink: #e8e6e1; --muted: #a8acb0; --grid: #363a3f; --plain: #f0a35c; --batch_norm: #6cb8f2; }
}
text { font: 15px system-ui, sans-serif; fill: var(--muted); }
.title { font-size: 17px; font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--grid); }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.band { opacity: 0.18; }
"""

Curve = list[tuple[float, float]]
Words = dict[str, str]
WORDS: dict[str, Words] = {
    "demo.svg": {
        "plain": "without BN",
        "batch_norm": "with BN",
        "learning": "It learns in fewer steps",
        "step": "step, at learning rate 0.1",
        "sweep": "It trains at more rates",
        "rate": "learning rate",
        "label": "Two plots of accuracy, mean and range of {seeds} seeds. Left: in the first {steps} steps at learning rate 0.1 the "
        "network with BN learns sooner. Right: test accuracy at the learning rates {rates}: {said}.",
    },
    "demo-zh.svg": {
        "plain": "不用 BN",
        "batch_norm": "用 BN",
        "learning": "用更少的步数学会",
        "step": "训练步数（学习率 0.1）",
        "sweep": "能用的学习率更多",
        "rate": "学习率",
        "label": "两幅准确率图，{seeds} 个随机种子的均值与范围。左图：学习率 0.1 时，用 BN 的网络在前 {steps} 步学得更快。"
        "右图：学习率为 {rates} 时的测试准确率：{said}。",
    },
}


def across(seeds: Sequence[Curve]) -> list[tuple[float, float, float, float]]:
    """x, and the mean, least and largest y of the seeds, which are measured at the same x."""
    return [(points[0][0], *summary([y for _, y in points])) for points in zip(*seeds, strict=True)]


def summary(ys: list[float]) -> tuple[float, float, float]:
    """Mean, minimum, maximum."""
    return fmean(ys), min(ys), max(ys)


def panel(
    left: float, title: str, below: str, words: Words, arms: dict[str, list[Curve]], ticks: Sequence[float], log: bool
) -> list[str]:
    """One plot of accuracy, 0 to 100 %, over x."""
    place = log10 if log else float
    first, last = place(ticks[0]), place(ticks[-1])

    def at(x: float, y: float) -> str:
        return f"{left + (place(x) - first) / (last - first) * PANEL:.1f},{TOP + (1 - y) * DEEP:.1f}"

    bottom = TOP + DEEP
    found = [f'<text class="title" x="{left}" y="{TOP - 42}">{title}</text>']
    for percent in range(0, 101, 50):
        y = bottom - percent / 100 * DEEP
        found += [
            f'<path class="grid" d="M{left} {y:.1f}h{PANEL}"/>',
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>',
        ]
    for tick in ticks[:: len(ticks) // 3]:
        x = at(tick, 0).split(",")[0]
        found.append(f'<text x="{x}" y="{bottom + 22}" text-anchor="middle">{tick:g}</text>')
    found.append(f'<text x="{left + PANEL / 2}" y="{bottom + 46}" text-anchor="middle">{below}</text>')
    for (arm, dash), x in zip(ARMS, (left, left + 134), strict=True):
        points = across(arms[arm])
        band = " ".join([at(p[0], p[2]) for p in points] + [at(p[0], p[3]) for p in reversed(points)])
        line = " ".join(at(p[0], p[1]) for p in points)
        color, pattern = f"var(--{arm})", f'stroke-dasharray="{dash}"'
        found += [
            f'<polygon class="band" fill="{color}" points="{band}"/>',
            f'<polyline class="line" stroke="{color}" {pattern} points="{line}"/>',
            *(f'<circle fill="{color}" r="3.5" cx="{c[0]}" cy="{c[1]}"/>' for c in map(corner, line.split()) if log),
            f'<path class="line" stroke="{color}" {pattern} d="M{x} {TOP - 18}h26"/>',
            f'<text x="{x + 32}" y="{TOP - 13}">{words[arm]}</text>',
        ]
    return found


def corner(point: str) -> list[str]:
    """The coordinates of a point."""
    return point.split(",")


def draw(result: dict, words: Words) -> str:
    """The picture of a result of the experiment `demo` in the words of a language, as SVG."""

    def curves(name: str) -> dict[str, list[Curve]]:
        return {
            arm: [[(x, y) for x, y in seed["curves"][name]] for seed in seeds]
            for arm, seeds in result["by_arm"].items()
        }

    learning, sweep = curves("course@0.1"), curves("sweep")
    early = {arm: [[p for p in seed if p[0] <= STEPS] for seed in seeds] for arm, seeds in learning.items()}
    rates = [x for x, _ in sweep["plain"][0]]
    ends = {arm: across(seeds) for arm, seeds in sweep.items()}
    said = "; ".join(f"{words[arm]} {', '.join(f'{end[1]:.0%}' for end in ends[arm])}" for arm, _ in ARMS)
    shown = ", ".join(f"{rate:g}" for rate in rates)
    label = words["label"].format(seeds=len(learning["plain"]), steps=STEPS, rates=shown, said=said)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="var(--paper)"/>',
            *panel(LEFT, words["learning"], words["step"], words, early, range(0, STEPS + 1, 50), False),
            *panel(LEFT + PANEL + GAP, words["sweep"], words["rate"], words, sweep, rates, True),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    for name, words in WORDS.items():
        (ASSETS / name).write_text(draw(json.loads(RESULT.read_text()), words))
