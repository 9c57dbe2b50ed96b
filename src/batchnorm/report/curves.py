"""The plots of a lab experiment: one for each kind of curve, or one of the headline number if there are no curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from batchnorm.lab.experiment import Experiment, Measured, Results
from batchnorm.report.plots import BATCH_NORM, MORE, MUTED, PLAIN, PLAIN_NUMBER, inline_svg
from batchnorm.report.rows import spread

COLORS = (PLAIN, BATCH_NORM, *MORE)
DASHES: tuple[Any, ...] = (
    (0, (4, 1.5)),
    "solid",
    (0, (1, 1.2)),
    (0, (5, 1.2, 1, 1.2)),
)  # distinguishes arms without color too
SIZE = (5.6, 3.9)  # the width has about as many units as a phone has pixels, so text stays legible there
Points = list[tuple[float, float]]


def drawings(experiment: Experiment, results: Results) -> list[tuple[str, str, str]]:
    """Each plot as inline SVG, with its title and caption."""
    drawn = [
        (_curves(experiment, results, name), curve.title, curve.caption)
        for name, curve in experiment.curves.items()
        if any(name in measured.curves for arm in experiment.arms for measured in results.by_arm[arm])
    ]
    headline = next(iter(experiment.metrics))
    return drawn or [(_dots(experiment, results, headline), experiment.metrics[headline].label, "")]


def _curves(experiment: Experiment, results: Results, name: str) -> str:
    """A line for each arm, the mean over seeds, in the range of the seeds or in its own band."""
    curve = experiment.curves[name]
    lines = {arm: _mean(results.by_arm[arm], name) for arm in experiment.arms}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (arm, line) in enumerate(lines.items()):
            style = {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}
            low, high = _band(results.by_arm[arm], name)
            if low:
                axes.fill_between(*_columns(low), _columns(high)[1], color=style["color"], alpha=0.15, linewidth=0)
            marker = "o" if len(line) <= 12 else ""
            axes.plot(*_columns(line), label=experiment.arms[arm], marker=marker, markersize=4, **style)
        _scale(axes, curve.log_x, curve.log_y, sorted({x for line in lines.values() for x, _ in line}))
        axes.set(xlabel=curve.x, ylabel=curve.y)
        _legend(figure, len(lines))

    ends = "; ".join(f"{experiment.arms[arm]} {_ends(line)}" for arm, line in lines.items())
    return inline_svg(f"{experiment.name}-{name}", f"{curve.title}: {ends}.", draw, SIZE)


def _mean(seeds: Sequence[Measured], name: str) -> Points:
    """The mean over the seeds at points where all of them are finite."""
    by_x: dict[float, list[float]] = {}
    for measured in seeds:
        for x, y in measured.curves.get(name, ()):
            by_x.setdefault(x, []).append(y)
    return [
        (x, fmean(values))
        for x, values in sorted(by_x.items())
        if len(values) == len(seeds) and all(map(math.isfinite, values))
    ]


def _band(seeds: Sequence[Measured], name: str) -> tuple[Points, Points]:
    if any(f"{name}.low" in measured.curves for measured in seeds):
        return _mean(seeds, f"{name}.low"), _mean(seeds, f"{name}.high")
    known = [dict(measured.curves.get(name, ())) for measured in seeds]
    xs = [x for x, _ in _mean(seeds, name)]
    low, high = ([(x, pick(each[x] for each in known)) for x in xs] for pick in (min, max))
    return low, high


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _scale(axes: Axes, log_x: bool, log_y: bool, xs: Sequence[float]) -> None:
    if log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 1000 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(PLAIN_NUMBER)
            axes.yaxis.set_minor_locator(NullLocator())
    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(PLAIN_NUMBER)
        if len(xs) <= 8:
            axes.set_xticks(xs)
            axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, lines: int) -> None:
    """Place the legend above the plot, in as many columns as fit."""
    for columns in range(2 if lines > 3 else lines, 0, -1):
        legend = figure.legend(loc="outside upper left", ncols=columns, fontsize=10, handlelength=2.6)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _ends(line: Points) -> str:
    return f"{line[0][1]:.3g} to {line[-1][1]:.3g}" if line else "nothing finite"


def _dots(experiment: Experiment, results: Results, name: str) -> str:
    """A row for each arm, with a dot for each seed and a bar at their mean."""
    metric = experiment.metrics[name]
    values = {arm: _finite(results.values(arm, name)) for arm in experiment.arms}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, (arm, found) in enumerate(values.items()):
            color = COLORS[row % len(COLORS)]
            axes.plot(found, [-row] * len(found), "o", color=color, markersize=6, alpha=0.7)
            if found:
                axes.plot(fmean(found), -row, "|", color=color, markersize=18, markeredgewidth=2)
            else:
                place = axes.get_yaxis_transform()
                axes.text(
                    0.02, -row, spread(metric, results.values(arm, name)), transform=place, color=MUTED, va="center"
                )
        axes.set_yticks([-row for row in range(len(values))], list(experiment.arms.values()))
        axes.set(xlabel=metric.label, ylim=(0.6 - len(values), 0.6))

    said = "; ".join(f"{experiment.arms[arm]} {spread(metric, results.values(arm, name))}" for arm in values)
    size = (SIZE[0], 1.0 + 0.42 * len(values))
    return inline_svg(f"{experiment.name}-dots", f"{metric.label}: {said}.", draw, size)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
