"""The numbers of an experiment as text, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from batchnorm.lab.experiment import Experiment, Metric, Results, Size
from batchnorm.lab.result import Outcome
from batchnorm.language import marked, tr

MISSING = "–"
SIZES: Mapping[Size, str] = {"quick": marked("quick"), "default": marked("default"), "full": marked("full")}
MOST_COLUMNS = 3  # maximum number of arms side by side


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
        return tr(
            "{size}, {finished} of {units} measured; numbers are of the finished ones",
            size=tr(SIZES[outcome.size]),
            finished=outcome.finished,
            units=outcome.units,
        )
    if outcome.seeds == 1:
        return tr("{size}, 1 seed", size=tr(SIZES[outcome.size]))
    return tr("{size}, {seeds} seeds; mean ± standard deviation", size=tr(SIZES[outcome.size]), seeds=outcome.seeds)


def spread(metric: Metric, values: Sequence[float]) -> str:
    """Mean ± sample standard deviation of the seeds; a list of all seeds if the metric asks for it, or one never reached the target."""
    measured = [value for value in values if not math.isnan(value)]
    if not measured:
        return MISSING
    if metric.each or not all(map(math.isfinite, measured)):
        return ", ".join(map(metric, measured))
    deviation = f" ±\u00a0{metric(stdev(measured))}" if len(measured) > 1 else ""
    return f"{metric(fmean(measured))}{deviation}"
