"""The four plots of the demonstration, as inline SVG that takes its fonts and colors from the page around it.

Matplotlib draws with placeholder colors; they become CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from batchnorm.lab.result import Arm, Result, Training

INK, MUTED, GRID = "#010101", "#020202", "#030303"
ARM_COLORS = {"plain": "#040404", "batch_norm": "#050505"}
ARM_LINES = {"plain": (0, (4, 1.5)), "batch_norm": "solid"}
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", "#040404": "--plain", "#050505": "--batch-norm"}
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
WIDTH, HEIGHT = (
    5.6,
    3.8,
)  # inches of 72 units: about as many units as a telephone has pixels, so that text stays legible
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f}%")
PLAIN_NUMBER = FuncFormatter(lambda value, _: f"{value:g}")


def learning_curves(result: Result) -> str:
    """Validation accuracy against the step at the common learning rate: one thin line per seed, their mean thick."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        target = result.protocol["target"]
        axes.axhline(target, color=MUTED, linewidth=0.8)
        axes.annotate(f"{target:.0%}", (1, target), xycoords=("axes fraction", "data"), xytext=(3, 0),
                      textcoords="offset points", va="center", color=MUTED)  # fmt: skip
        for arm in result.arms:
            group = _common(result, arm)
            for training in group:
                axes.plot(
                    training.steps, training.validation_accuracy, color=ARM_COLORS[arm.name], linewidth=0.7, alpha=0.5
                )
            shared = min((training.steps for training in group), key=len)  # one that diverged ends early
            curves = zip(*(training.validation_accuracy[: len(shared)] for training in group), strict=True)
            axes.plot(shared, [fmean(point) for point in curves], label=arm.label,
                      color=ARM_COLORS[arm.name], linestyle=ARM_LINES[arm.name], linewidth=2)  # fmt: skip
        axes.set(xlabel="step", ylabel="validation accuracy", xlim=(0, None), ylim=(0.4, 1.01))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.legend(loc="lower right")

    description = (
        f"Line chart of validation accuracy against training step at learning rate {_rate(result)}. "
        + "; ".join(
            f"{arm.label}, steps to {result.protocol['target']:.0%} per seed: "
            + ", ".join("never" if steps is None else str(steps) for steps in arm.steps_to_target)
            for arm in result.arms
        )
    )
    return _svg("curves", description, draw)


def learning_rate_sweep(result: Result) -> str:
    """Test accuracy against the learning rate: mean of the seeds, and a bar from the least to the greatest."""
    rates = sorted(result.protocol["learning_rates"])

    def accuracies(arm: Arm) -> list[list[float]]:
        return [
            [t.test_accuracy for t in result.trainings if t.arm == arm.name and t.learning_rate == rate]
            for rate in rates
        ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for arm in result.arms:
            groups = accuracies(arm)
            color = ARM_COLORS[arm.name]
            axes.vlines(
                rates, [min(group) for group in groups], [max(group) for group in groups], color=color, linewidth=1.2
            )
            axes.plot(rates, [fmean(group) for group in groups], label=arm.label, marker="o", markersize=4.5,
                      color=color, linestyle=ARM_LINES[arm.name])  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(rates)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(PLAIN_NUMBER)
        axes.set(xlabel="learning rate", ylabel="test accuracy", ylim=(0, 1.04))
        axes.yaxis.set_major_formatter(PERCENT)
        axes.legend(loc="lower center")

    description = "Line chart of test accuracy against learning rate. " + "; ".join(
        f"{arm.label}: "
        + ", ".join(f"{fmean(group):.0%} at {rate:g}" for rate, group in zip(rates, accuracies(arm), strict=True))
        for arm in result.arms
    )
    return _svg("sweep", description, draw)


def hidden_distribution(result: Result) -> str:
    """Percentiles 15, 50 and 85 of what a typical unit of the last hidden activation receives (paper, figure 1b and c)."""

    def draw(figure: Figure) -> None:
        for axes, arm in _panels(figure, result):
            training = _common(result, arm)[0]
            low, middle, high = zip(*training.percentiles, strict=True)
            steps, color = training.steps, ARM_COLORS[arm.name]
            finite = [index for index, row in enumerate(training.percentiles) if None not in row]
            steps, low, middle, high = ([values[index] for index in finite] for values in (steps, low, middle, high))
            axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot(steps, low, steps, high, color=color, linewidth=0.9)
            axes.plot(steps, middle, color=color, linewidth=2)
            for values, name in ((low, "15th"), (middle, "median"), (high, "85th")):
                axes.annotate(name, (steps[-1], values[-1]), xytext=(-2, 3), textcoords="offset points",
                              ha="right", va="bottom", color=MUTED, fontsize=9.5)  # fmt: skip
        figure.axes[0].set_ylabel("input of the activation")

    description = (
        f"Bands from the 15th to the 85th percentile of a hidden unit's input at learning rate {_rate(result)}. "
        + (
            "; ".join(
                f"{arm.label}, largest move of the median in widths of the first distribution: "
                + ", ".join("diverged" if drift is None else f"{drift:.2f}" for drift in arm.drift)
                for arm in result.arms
            )
        )
    )
    return _svg("distribution", description, draw)


def gradient_norms(result: Result) -> str:
    """Norm of the gradient of each linear layer's weights against the step, mean of the seeds; the dot is the initialization."""

    def means(arm: Arm) -> tuple[list[int], list[list[float]]]:
        group = _common(result, arm)
        steps = min((training.steps for training in group), key=len)
        rows = [[training.gradient_norms[index] for training in group] for index in range(len(steps))]
        finite = [index for index, seeds in enumerate(rows) if not any(None in norms for norms in seeds)]
        layers = range(len(rows[0][0]))
        return [steps[index] for index in finite], [
            [fmean(norms[layer] or 0.0 for norms in rows[index]) for index in finite] for layer in layers
        ]

    def draw(figure: Figure) -> None:
        for axes, arm in _panels(figure, result):
            steps, layers = means(arm)
            for layer, norms in enumerate(layers):
                style = {"linestyle": ("solid", (0, (5, 1.5)), (0, (1, 1.2)))[layer % 3], "color": ARM_COLORS[arm.name]}
                axes.plot(steps, norms, label=f"layer {layer + 1}", linewidth=1.5, **style)
                axes.plot(steps[:1], norms[:1], marker="o", markersize=4.5, color=ARM_COLORS[arm.name])
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.yaxis.set_major_formatter(PLAIN_NUMBER)
            axes.yaxis.set_minor_locator(NullLocator())
            axes.legend(loc="lower left", fontsize=9.5, handlelength=2.2)
        figure.axes[0].set_ylabel("gradient norm")

    description = (
        f"Line charts of the gradient norm of each layer's weights at learning rate {_rate(result)}. "
        + "; ".join(
            f"{arm.label}, at initialization: "
            + ", ".join(f"layer {layer + 1} {norms[0]:.2g}" for layer, norms in enumerate(means(arm)[1]))
            for arm in result.arms
        )
    )
    return _svg("gradients", description, draw)


def _common(result: Result, arm: Arm) -> list[Training]:
    rate = result.protocol["common_learning_rate"]
    return [training for training in result.trainings if training.arm == arm.name and training.learning_rate == rate]


def _rate(result: Result) -> str:
    return f"{result.protocol['common_learning_rate']:g}"


def _panels(figure: Figure, result: Result) -> list[tuple[Axes, Arm]]:
    """One panel per arm, side by side on the same scale."""
    row = figure.subplots(1, len(result.arms), sharey=True, squeeze=False)[0]
    for axes, arm in zip(row, result.arms, strict=True):
        axes.set(title=arm.label, xlabel="step")
    return list(zip(row, result.arms, strict=True))


def _svg(name: str, description: str, draw: Callable[[Figure], None]) -> str:
    """Run `draw` on an empty figure and return its `<svg>` element: no fonts, colors or addresses of its own."""
    with mpl.rc_context(STYLE), mpl.rc_context({"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # four drawings share one page
    svg = re.sub(
        r"font-family: [^;\"]*;?|font: ([\d.]+px) [^;\"]*", lambda m: f"font-size: {m[1]}" if m[1] else "", svg
    )
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    opening = f'<svg role="img" aria-label="{html.escape(description)}" '
    return re.sub(r"<svg [^>]*?(?=viewBox)", lambda _: opening, svg, count=1)
