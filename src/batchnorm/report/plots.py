"""The four plots of the demonstration, as inline SVG that uses the fonts and colors of its page.

Matplotlib draws with placeholder colors; they become CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from batchnorm.lab.result import Arm, Result, Training
from batchnorm.report.rows import test_accuracy

INK, MUTED, GRID, PLAIN, BATCH_NORM = "#010101", "#020202", "#030303", "#040404", "#050505"
MORE = ("#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PLAIN: "--plain", BATCH_NORM: "--batch-norm"}
VARIABLES |= {color: f"--series-{number}" for number, color in enumerate(MORE, start=3)}
COLORS = {"plain": PLAIN, "batch_norm": BATCH_NORM}
LINES: dict[str, Any] = {  # distinguishes arms without color too
    "plain": {"color": PLAIN, "linestyle": (0, (4, 1.5))},
    "batch_norm": {"color": BATCH_NORM, "linestyle": "solid"},
}
LAYER_LINES: list[Any] = ["solid", (0, (5, 1.5)), (0, (1, 1.2))]
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
# In inches of 72 units. The width has about as many units as a phone has pixels, so text stays legible there.
SIZE = (5.6, 3.8)
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f}%")
PLAIN_NUMBER = FuncFormatter(lambda value, _: f"{value:g}")


def learning_curves(result: Result) -> str:
    """Validation accuracy against the step at the common learning rate: one thin line per seed, their mean thick."""
    target = result.protocol["target"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(target, color=MUTED, linewidth=0.8)
        axes.text(1.01, target, f"{target:.0%}", transform=axes.get_yaxis_transform(), va="center", color=MUTED)
        for arm in result.arms:
            group = _common(result, arm)
            for training in group:
                curve = training.validation_accuracy
                axes.plot(training.steps, curve, color=COLORS[arm.name], linewidth=0.7, alpha=0.5)
            steps = _shared_steps(group)
            means = [fmean(training.validation_accuracy[index] for training in group) for index in range(len(steps))]
            axes.plot(steps, means, label=arm.label, linewidth=2, **LINES[arm.name])
        axes.set(xlabel="step", ylabel="validation accuracy", xlim=(0, None), ylim=(0.4, 1.01))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.legend(loc="lower right")

    def say(arm: Arm) -> str:
        return ", ".join("never" if steps is None else str(steps) for steps in arm.steps_to_target)

    title = f"Validation accuracy against the step; steps to {target:.0%} per seed"
    return inline_svg("curves", _description(title, result, say), draw)


def learning_rate_sweep(result: Result) -> str:
    """Test accuracy against the learning rate: mean of the seeds, and a bar from the smallest to the largest."""
    rates = sorted(result.protocol["learning_rates"])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for arm in result.arms:
            groups = [test_accuracy(result, arm, rate) for rate in rates]
            axes.vlines(rates, list(map(min, groups)), list(map(max, groups)), color=COLORS[arm.name], linewidth=1.2)
            axes.plot(rates, list(map(fmean, groups)), label=arm.label, marker="o", markersize=4.5, **LINES[arm.name])
        axes.set_xscale("log")
        axes.set_xticks(rates)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(PLAIN_NUMBER)
        axes.set(xlabel="learning rate", ylabel="test accuracy", ylim=(0, 1.04))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.legend(loc="lower center")

    def say(arm: Arm) -> str:
        return ", ".join(f"{fmean(test_accuracy(result, arm, rate)):.0%} at {rate:g}" for rate in rates)

    return inline_svg("sweep", _description("Test accuracy against the learning rate", result, say), draw)


def hidden_distribution(result: Result) -> str:
    """Percentiles 15, 50 and 85 of the input of a typical unit of the last hidden activation (paper, figure 1b and c)."""

    def draw(figure: Figure) -> None:
        for axes, arm in _panels(figure, result):
            training, color = _common(result, arm)[0], COLORS[arm.name]
            drawn = [
                (step, *row) for step, row in zip(training.steps, training.percentiles, strict=True) if None not in row
            ]
            if len(drawn) < 2:  # a single point is not a line
                _say_nothing_to_show(axes)
                continue
            steps, low, middle, high = (list(column) for column in zip(*drawn, strict=True))
            axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(steps, low, steps, high, color=color, linewidth=0.9)
            axes.plot(steps, middle, color=color, linewidth=2)
            if axes is figure.axes[-1]:
                for row, name in ((low, "15th"), (middle, "median"), (high, "85th")):
                    place = axes.get_yaxis_transform()
                    axes.text(1.03, row[-1], name, transform=place, va="center", color=MUTED, fontsize=9.5)
        figure.axes[0].set_ylabel("input of the activation")

    def say(arm: Arm) -> str:
        return ", ".join("diverged" if drift is None else f"{drift:.2f}" for drift in arm.drift)

    title = (
        "Bands from the 15th to the 85th percentile of a hidden unit's input against the step; "
        "largest move of the median per seed, in widths of the first distribution"
    )
    return inline_svg("distribution", _description(title, result, say), draw)


def gradient_norms(result: Result) -> str:
    """Norm of the gradient of each linear layer's weights against the step, mean of the seeds; the dot is the initialization."""

    def means(arm: Arm) -> list[tuple[int, list[float]]]:
        """Steps with the mean of each layer, except steps at which a seed has diverged."""
        group = _common(result, arm)
        steps_and_means = []
        for index, step in enumerate(_shared_steps(group)):
            by_layer = list(zip(*(training.gradient_norms[index] for training in group), strict=True))
            finite = [[norm for norm in seeds if norm is not None] for seeds in by_layer]
            if all(len(seeds) == len(group) for seeds in finite):
                steps_and_means.append((step, list(map(fmean, finite))))
        return steps_and_means

    def draw(figure: Figure) -> None:
        for axes, arm in _panels(figure, result):
            steps_and_means = means(arm)
            if not steps_and_means:
                _say_nothing_to_show(axes)
                continue
            steps, norms = zip(*steps_and_means, strict=True)
            for number, (layer, line) in enumerate(zip(zip(*norms, strict=True), LAYER_LINES, strict=True), start=1):
                axes.plot(steps, layer, label=f"layer {number}", linewidth=1.5, color=COLORS[arm.name], linestyle=line)
                axes.plot(steps[0], layer[0], marker="o", markersize=4.5, color=COLORS[arm.name])
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.yaxis.set_major_formatter(PLAIN_NUMBER)
            axes.yaxis.set_minor_locator(NullLocator())
            axes.legend(loc="lower left", fontsize=9.5, handlelength=2.2)
        figure.axes[0].set_ylabel("gradient norm")

    def say(arm: Arm) -> str:
        steps_and_means = means(arm)
        if not steps_and_means:
            return "diverged"
        _, initial = steps_and_means[0]
        return ", ".join(f"layer {number} {norm:.2g}" for number, norm in enumerate(initial, start=1))

    title = "Gradient norm of each layer's weights against the step; at initialization"
    return inline_svg("gradients", _description(title, result, say), draw)


def _common(result: Result, arm: Arm) -> list[Training]:
    rate = result.protocol["common_learning_rate"]
    return [training for training in result.trainings if training.arm == arm.name and training.learning_rate == rate]


def _shared_steps(group: Sequence[Training]) -> list[int]:
    """The steps at which every seed was measured; a seed that diverges ends early."""
    return min((training.steps for training in group), key=len)


def _panels(figure: Figure, result: Result) -> list[tuple[Axes, Arm]]:
    """One panel per arm, side by side on the same scale."""
    row = figure.subplots(1, len(result.arms), sharey=True, squeeze=False)[0]
    for axes, arm in zip(row, result.arms, strict=True):
        axes.set(title=arm.label, xlabel="step")
    return list(zip(row, result.arms, strict=True))


def _say_nothing_to_show(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing to show:\nit diverged at once", transform=axes.transAxes, ha="center", color=MUTED)
    axes.set_xticks([])


def _description(title: str, result: Result, say: Callable[[Arm], str]) -> str:
    """The plot in words, for screen readers."""
    return f"{title}: " + "; ".join(f"{arm.label} {say(arm)}" for arm in result.arms) + "."


def inline_svg(name: str, description: str, draw: Callable[[Figure], None], size: tuple[float, float] = SIZE) -> str:
    """Run `draw` on an empty figure and return its `<svg>` element, without fonts, colors and links."""
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
