"""The numbers of a result as text, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from batchnorm.lab.experiment import Experiment, Metric, Results
from batchnorm.lab.outcome import Outcome
from batchnorm.lab.result import Arm, Result

MISSING = "–"
MOST_COLUMNS = 3  # maximum number of arms side by side


def percent(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation of shares, in percent."""
    if not values:
        return MISSING
    spread = f"\u00a0±\u00a0{100 * stdev(values):.1f}" if len(values) > 1 else ""  # no-break spaces
    return f"{100 * fmean(values):.1f}{spread}%"


def steps(values: Sequence[int | None]) -> str:
    """The number of steps of each seed, and their mean if all seeds reached the target."""
    if not values:
        return MISSING
    reached = [value for value in values if value is not None]
    if not reached:
        return "never"
    listed = ", ".join("never" if value is None else str(value) for value in values)
    return listed if len(reached) < len(values) or len(values) == 1 else f"{fmean(reached):.0f} ({listed})"


def learning_rates(trains_at: Sequence[float], tried: Sequence[float]) -> str:
    """The range of learning rates that train, or their list if there are gaps."""
    if not trains_at:
        return "none"
    inside = [rate for rate in tried if trains_at[0] <= rate <= trains_at[-1]]
    if len(trains_at) > 1 and inside == list(trains_at):
        return f"{trains_at[0]:g} – {trains_at[-1]:g}"
    return ", ".join(f"{rate:g}" for rate in trains_at)


def summary_rows(result: Result) -> list[tuple[str, list[str]]]:
    """A label and one cell per arm, for each headline number."""
    common, target = result.protocol["common_learning_rate"], result.protocol["target"]
    tried = result.protocol["learning_rates"]

    def best(arm: Arm) -> str:
        return MISSING if arm.best_learning_rate is None else f"{arm.best_learning_rate:g}"

    def trains(arm: Arm) -> str:
        return MISSING if arm.best_learning_rate is None else learning_rates(arm.trains_at, tried)

    return [
        ("Test accuracy, best learning rate", [percent(arm.test_accuracy) for arm in result.arms]),
        ("Best learning rate (on validation)", [best(arm) for arm in result.arms]),
        (f"Test accuracy, learning rate {common:g}", [percent(arm.common_test_accuracy) for arm in result.arms]),
        (f"Steps to {target:.0%}, learning rate {common:g}", [steps(arm.steps_to_target) for arm in result.arms]),
        ("Learning rates that train", [trains(arm) for arm in result.arms]),
    ]


def sweep_rows(result: Result) -> list[tuple[str, list[str]]]:
    """For each learning rate the test accuracy of each arm."""
    return [
        (f"{rate:g}", [percent(test_accuracy(result, arm, rate)) for arm in result.arms])
        for rate in sorted(result.protocol["learning_rates"])
    ]


def test_accuracy(result: Result, arm: Arm, rate: float) -> list[float]:
    """The test accuracy of each finished seed."""
    return [
        training.test_accuracy
        for training in result.trainings
        if training.arm == arm.name and training.learning_rate == rate
    ]


def comparison(experiment: Experiment, results: Results) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Labels of columns, and rows of a label and cells: a column for each arm, or a row for each if there are many."""
    cells = {
        (arm, name): spread(metric, results.values(arm, name))
        for arm in experiment.arms
        for name, metric in experiment.metrics.items()
    }
    labels = {name: metric.label for name, metric in experiment.metrics.items()}
    if len(experiment.arms) <= MOST_COLUMNS:
        rows = [(labels[name], [cells[arm, name] for arm in experiment.arms]) for name in labels]
        return list(experiment.arms.values()), rows
    rows = [(label, [cells[arm, name] for name in labels]) for arm, label in experiment.arms.items()]
    return list(labels.values()), rows


def extent(experiment: Experiment, outcome: Outcome) -> str:
    """Size and seeds of a run, and how they are summarized."""
    if not outcome.verdicts(experiment):
        return f"{outcome.size}, {outcome.finished} of {outcome.units} measured; numbers are of the finished ones"
    return f"{outcome.size}, " + (
        "1 seed" if outcome.seeds == 1 else f"{outcome.seeds} seeds; mean ± standard deviation"
    )


def spread(metric: Metric, values: Sequence[float]) -> str:
    """Mean ± sample standard deviation of the seeds; a list of all seeds if one of them never reached the target."""
    measured = [value for value in values if not math.isnan(value)]
    if not measured:
        return MISSING
    if not all(map(math.isfinite, measured)):
        return ", ".join(map(metric, measured))
    deviation = f"\u00a0±\u00a0{metric(stdev(measured))}" if len(measured) > 1 else ""
    return f"{metric(fmean(measured))}{deviation}"
