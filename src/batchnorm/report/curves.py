"""The plots of a lab experiment: one for each kind of curve, or one of the headline number if there are no curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from batchnorm.lab.experiment import Curve, Experiment, Measured, Results
from batchnorm.language import marked, tr
from batchnorm.report.plots import (
    BATCH_NORM,
    MORE,
    MUTED,
    PLAIN,
    PLAIN_NUMBER,
    Answers,
    Frame,
    Plot,
    Series,
    belongs,
    drawable,
    plot,
)
from batchnorm.report.rows import spread

CAPTIONS = {
    "higher": marked("A dot for each seed, and a bar at their mean; higher is better."),
    "lower": marked("A dot for each seed, and a bar at their mean; lower is better."),
    "neither": marked("A dot for each seed, and a bar at their mean."),
}
COLORS = (PLAIN, BATCH_NORM, *MORE)
DASHES = ("6.4 2.4", "", "1.6 1.9", "8 1.9 1.6 1.9")  # distinguishes arms without color too
SIZE = (5.6, 3.9)  # the width has about as many units as a phone has pixels, so text stays legible there
WIDTH = 1.6  # of lines
Points = list[tuple[float, float]]


class Drawn(NamedTuple):
    """A plot with its title and its caption, which says what to see."""

    plot: Plot
    title: str
    caption: str


def drawings(experiment: Experiment, results: Results) -> list[Drawn]:
    """Each plot of an experiment."""
    drawn = [
        _drawn(experiment, results, name, curve)
        for name, curve in experiment.curves.items()
        if any(name in measured.curves for arm in experiment.arms for measured in results.by_arm[arm])
    ]
    metric = experiment.metrics[headline := next(iter(experiment.metrics))]
    told = {arm: spread(metric, results.values(arm, headline)) for arm in experiment.arms}
    values = {arm: results.values(arm, headline) for arm in experiment.arms}
    caption = tr(CAPTIONS[metric.better])
    return drawn or [Drawn(_dots(experiment, metric.label, values, told, None), _capital(metric.label), caption)]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _drawn(experiment: Experiment, results: Results, name: str, curve: Curve) -> Drawn:
    """The curve as lines; as a dot for each seed if it has a single point, as in quick runs."""
    xs = {x for arm in experiment.arms for x, _ in _mean(results.by_arm[arm], name)}
    if len(xs) != 1:
        return Drawn(_curves(experiment, results, name, curve), curve.title, curve.caption)
    (x,) = xs
    values = {arm: [dict(each.curves[name])[x] for each in results.by_arm[arm]] for arm in experiment.arms}
    told = {arm: ", ".join(f"{value:.4g}" for value in found) for arm, found in values.items()}
    title = f"{curve.title}: {curve.x} {x:g}"
    return Drawn(
        _dots(experiment, curve.y, values, told, curve.level),
        title,
        f"{curve.caption} " + tr("This run has one point for each arm."),
    )


def _curves(experiment: Experiment, results: Results, name: str, curve: Curve) -> Plot:
    """A line for each arm, the mean over seeds, in the range of the seeds or in its own band."""
    lines = _series(experiment, results, name, curve)
    frames = _frames(experiment, results, name, curve) if curve.slider else []

    def draw(figure: Figure) -> Axes:
        axes = figure.subplots()
        for line in lines:
            if line.points:
                x, y, low, high = zip(*line.points, strict=True)
                belongs(axes.fill_between(x, low, high, color=line.color, alpha=0.15, linewidth=0), line.arm)
                marker = "o" if len(line.points) <= 12 else ""
                (drawn,) = axes.plot(x, y, color=line.color, linestyle=_style(line.dash), marker=marker, markersize=4)
                belongs(drawn, line.arm)
            axes.plot([], [], label=drawable(line.label), color=line.color, linestyle=_style(line.dash))
        for each in (one for frame in frames for one in frame.series):
            axes.update_datalim([(axes.dataLim.x0, y) for line in (each.points, *each.seeds) for _, y, *_ in line])
        if curve.level is not None:
            axes.axhline(curve.level, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.autoscale_view()
        _scale(axes, curve.log_x, curve.log_y, sorted({point[0] for line in lines for point in line.points}))
        axes.set(xlabel=drawable(curve.x), ylabel=drawable(curve.y))
        _legend(figure, lines)
        return axes

    ends = "; ".join(f"{line.label} {_ends(line)}" for line in lines)
    answers = Answers(curve.title, "x", lines, curve.slider, frames)
    return plot(f"{experiment.name}-{name}", f"{curve.title}: {ends}.", draw, SIZE, answers)


def _series(experiment: Experiment, results: Results, name: str, curve: Curve) -> list[Series]:
    """For each arm the mean with its band, and each seed; where x is logarithmic, from the first positive x on."""

    def shown(points: Iterable[tuple[float, ...]]) -> list[Any]:
        return [point for point in points if point[0] > 0 or not curve.log_x]

    series = list[Series]()
    for index, (arm, label) in enumerate(experiment.arms.items()):
        seeds = results.by_arm[arm]
        low, high = _band(seeds, name)
        points = [(x, y, a, b) for (x, y), (_, a), (_, b) in zip(_mean(seeds, name), low, high, strict=True)]
        each = [shown(measured.curves.get(name, ())) for measured in seeds]
        color, dash = COLORS[index % len(COLORS)], DASHES[index % len(DASHES)]
        series.append(Series(arm, label, color, shown(points), dash, each))
    return series


def _frames(experiment: Experiment, results: Results, name: str, curve: Curve) -> list[Frame]:
    """A frame for each curve named as `name` up to its "@", in the order of the numbers after it."""
    family = name.partition("@")[0] + "@"
    names = dict.fromkeys(key for seeds in results.by_arm.values() for each in seeds for key in each.curves)
    values = sorted((key.removeprefix(family) for key in names if key.startswith(family)), key=float)
    return [
        Frame(value, _series(experiment, results, key, curve), key == name, _early_ends(experiment, results, key))
        for value in values
        if (key := family + value)
    ]


def _early_ends(experiment: Experiment, results: Results, name: str) -> str:
    """Of the trainings that end before others, since their loss is no longer finite, the last steps."""
    ends = {arm: [each.curves[name][-1][0] for each in results.by_arm[arm]] for arm in experiment.arms}
    last = max((end for arm in ends.values() for end in arm), default=0)
    early = {arm: [f"{end:g}" for end in found if end < last] for arm, found in ends.items()}
    return "; ".join(
        tr(
            "{arm}: the loss of {ended} of {seeds} seeds is no longer finite at step {steps}",
            arm=experiment.arms[arm],
            ended=len(steps),
            seeds=len(ends[arm]),
            steps=", ".join(steps),
        )
        for arm, steps in early.items()
        if steps
    )


def _style(dash: str) -> Any:
    """A line style of matplotlib, whose dashes are multiples of the line's width."""
    return (0, [float(part) / WIDTH for part in dash.split()]) if dash else "solid"


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
        low, high = (dict(_mean(seeds, f"{name}.{end}")) for end in ("low", "high"))
        return [(x, low.get(x, y)) for x, y in _mean(seeds, name)], [(x, high.get(x, y)) for x, y in _mean(seeds, name)]
    known = [dict(measured.curves.get(name, ())) for measured in seeds]
    xs = [x for x, _ in _mean(seeds, name)]
    low, high = ([(x, pick(each[x] for each in known)) for x in xs] for pick in (min, max))
    return low, high


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
        low, high = axes.get_xlim()
        if len(xs) <= 8:
            axes.set_xticks(xs)
        elif high < 1000 * low:
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, lines: Sequence[Series]) -> None:
    """Place the legend above the plot, in as many columns as fit."""
    for columns in range(2 if len(lines) > 3 else len(lines), 0, -1):
        legend = figure.legend(loc="outside upper left", ncols=columns, fontsize=10, handlelength=2.6)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            for line, handle, text in zip(lines, legend.legend_handles, legend.get_texts(), strict=True):
                assert handle is not None
                belongs(handle, line.arm, "legend")
                belongs(text, line.arm, "legend")
            return
        legend.remove()


def _ends(line: Series) -> str:
    if not line.points:
        return tr("nothing finite")
    return tr("{first:.3g} to {last:.3g}", first=line.points[0][1], last=line.points[-1][1])


def _dots(
    experiment: Experiment,
    label: str,
    values: Mapping[str, Sequence[float]],
    told: Mapping[str, str],
    level: float | None,
) -> Plot:
    """A row for each arm, with a dot for each seed and a bar at their mean; `told` are the values in words."""
    rows = {-row: name for row, name in enumerate(experiment.arms.values())}
    series = list[Series]()
    for row, arm in enumerate(experiment.arms):
        found = [value for value in values[arm] if math.isfinite(value)]
        points = [(value, -row, told[arm] if first == 0 else "") for first, value in enumerate(found)]
        series.append(Series(arm, experiment.arms[arm], COLORS[row % len(COLORS)], points))

    def draw(figure: Figure) -> Axes:
        axes = figure.subplots()
        for row, line in enumerate(series):
            found = [value for value, *_ in line.points]
            if found:
                (dots,) = axes.plot(found, [-row] * len(found), "o", color=line.color, markersize=6, alpha=0.7)
                (bar,) = axes.plot(fmean(found), -row, "|", color=line.color, markersize=18, markeredgewidth=2)
                belongs(dots, line.arm)
                belongs(bar, line.arm)
            else:
                place = axes.get_yaxis_transform()
                axes.text(0.02, -row, drawable(told[line.arm]), transform=place, color=MUTED, va="center")
        if level is not None:
            axes.axvline(level, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_yticks(list(rows), list(map(drawable, rows.values())))
        axes.set(xlabel=drawable(label), ylim=(0.6 - len(values), 0.6))
        return axes

    said = "; ".join(f"{experiment.arms[arm]} {text}" for arm, text in told.items())
    size = (SIZE[0], 1.0 + 0.42 * len(values))
    name = f"{experiment.name}-{label}-dots"
    return plot(name, f"{_capital(label)}: {said}.", draw, size, Answers(_capital(label), "y", series, rows=rows))
