"""BN1: what the arguments of layers say. No rule needs data."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.rule import Found, Rule


def _momentum(case: Case) -> Iterator[Found]:
    found = {norm.name: norm.momentum for norm in case.norms if norm.updates and (norm.momentum or 0) > at.MOMENTUM}
    worst = sorted(found, key=lambda name: -(found[name] or 0))
    if worst:
        largest = found[worst[0]] or 0.0
        yield Found(
            tuple(worst),
            {"momentum": largest},
            f"momentum is {largest:g}: one batch has {largest:.0%} of the weight in the running statistics",
        )


def _still(case: Case) -> Iterator[Found]:
    names = tuple(norm.name for norm in case.norms if norm.updates and norm.momentum == 0)
    if names:
        yield Found(names, {"momentum": 0.0}, "momentum is 0: the running statistics never change")


def _eps(case: Case) -> Iterator[Found]:
    found = dict[str, tuple[float, float]]()
    for norm in case.norms:
        pair, eps = norm.statistics(), norm.eps
        if pair is None or eps is None:
            continue
        small = (pair[1] < eps) & (pair[1] > eps * at.CONSTANT)
        share = float(small.double().mean())
        if eps > at.EPS or (share > at.EPS_SHARE and norm.started):
            found[norm.name] = (eps, share)
    worst = sorted(found, key=lambda name: -found[name][1])
    if worst:
        eps, share = found[worst[0]]
        yield Found(
            tuple(worst),
            {"eps": eps, "share_below_eps": share},
            f"eps is {eps:g}, and the variance of {share:.0%} of the channels is smaller, so their output is not normalized",
        )


def _no_statistics(case: Case) -> Iterator[Found]:
    names = tuple(
        norm.name
        for norm in case.norms
        if norm.kind in ("torch", "ours") and getattr(norm.module, "running_mean", None) is None
    )
    if names:
        yield Found(
            names, {"layers": len(names)}, "layers without running statistics normalize by the batch in inference too"
        )


RULES = (
    Rule(
        "BN101",
        "momentum is upside down",
        "warning",
        (),
        "torch's momentum is the weight of the new batch, Keras's and TensorFlow's that of the old value. A momentum "
        "above .5 makes the running "
        "statistics those of the last batch or two, and inference as noisy as one batch.",
        "layer.momentum = 1 - layer.momentum; bn.recalibrate(model, loader)",
        "layer.momentum = 1 - layer.momentum",
        _momentum,
        fixable=True,
    ),
    Rule(
        "BN102",
        "momentum is 0",
        "warning",
        (),
        "With momentum 0 the running statistics stay at their first values, while training normalizes by the batch: the "
        "two modes compute "
        "different functions. It does not freeze a layer, since its output in training still depends on the batch.",
        "bn.freeze(model)  # or layer.momentum = 0.1, then bn.recalibrate(model, loader)",
        "layer.momentum = 0.1",
        _still,
    ),
    Rule(
        "BN103",
        "eps is larger than the variance",
        "warning",
        (),
        "eps is there to avoid a division by zero. If it exceeds the variance of most channels, the output is scaled "
        "down instead of normalized. "
        "Reported for eps above .02, and if more than half of the running variances are smaller, constant channels not counted.",
        "layer.eps = 1e-5; bn.recalibrate(model, loader)  # and train on",
        "layer.eps = 1e-5",
        _eps,
    ),
    Rule(
        "BN104",
        "no running statistics",
        "note",
        (),
        "With track_running_stats=False a layer normalizes by the batch in inference too, so a prediction depends on "
        "its batch. Some models want that.",
        "nn.BatchNorm2d(C)  # with its default, track_running_stats=True; then bn.recalibrate(model, loader)",
        "nn.BatchNorm2d(C)  # with its default, track_running_stats=True",
        _no_statistics,
    ),
)
