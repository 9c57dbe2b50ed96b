"""An experiment in the language of the context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from batchnorm.lab.experiment import Curve, Experiment, Metric
from batchnorm.language import tr


def translated(experiment: Experiment) -> Experiment:
    """The experiment with all that readers read translated."""
    return replace(
        experiment,
        question=tr(experiment.question),
        source=tr(experiment.source),
        paper=_or_nothing(experiment.paper),
        protocol=_or_nothing(experiment.protocol),
        revised=_or_nothing(experiment.revised),
        claims={tr(claim): judge for claim, judge in experiment.claims.items()},
        arms={arm: tr(label) for arm, label in experiment.arms.items()},
        metrics={name: _metric(metric) for name, metric in experiment.metrics.items()},
        curves={name: _curve(curve) for name, curve in experiment.curves.items()},
    )


def _or_nothing(text: str) -> str:
    return tr(text) if text else ""


def _metric(metric: Metric) -> Metric:
    return replace(metric, label=tr(metric.label))


def _curve(curve: Curve) -> Curve:
    return replace(
        curve,
        title=tr(curve.title),
        x=tr(curve.x),
        y=tr(curve.y),
        caption=tr(curve.caption),
        slider=_or_nothing(curve.slider),
    )


def texts(experiment: Experiment) -> Iterator[str]:
    """What `translated` translates."""
    yield from filter(
        None, (experiment.question, experiment.source, experiment.paper, experiment.protocol, experiment.revised)
    )
    yield from experiment.claims
    yield from experiment.arms.values()
    yield from (metric.label for metric in experiment.metrics.values())
    for curve in experiment.curves.values():
        yield from filter(None, (curve.title, curve.x, curve.y, curve.caption, curve.slider))
