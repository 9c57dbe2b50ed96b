"""BN2: running statistics compared with the data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.measured import ratio
from batchnorm.diagnostics.norms import Norm
from batchnorm.diagnostics.record import LayerRecord, Record, divergence
from batchnorm.diagnostics.rule import Found, Rule, Severity, worst_first
from batchnorm.statistics import domain


class Drift(NamedTuple):
    """How far running statistics are from those of the data.

    Attributes:
        nats: divergence of the data's Gaussian from that of the running statistics, mean over channels.
        log_ratio: mean log ratio of standard deviations, data over running.
    """

    nats: float
    log_ratio: float


def drifts(record: Record, *, initial: bool = False) -> dict[str, Drift]:
    """The drift of each layer that learns statistics, on its input in training mode; with `initial`, of those of new layers too."""
    found = dict[str, Drift]()
    for name, layer in record.layers.items():
        measured = layer.trained and layer.norm.updates and (initial or layer.norm.started)
        drift = _drift(layer) if measured else None
        if drift is not None:
            found[name] = drift
    return found


def _held_drifts(record: Record) -> dict[str, Drift]:
    """The drift of each layer that normalizes by its running statistics in training too: frozen, or in inference mode there."""
    held = {name: _drift(layer) for name, layer in record.layers.items() if not layer.trained and layer.norm.started}
    return {name: drift for name, drift in held.items() if drift is not None}


def _drift(layer: LayerRecord) -> Drift | None:
    """The drift of a layer, of its worst domain if it has several."""
    found = list[Drift]()
    for name, part in layer.by_domain().items():
        with contextlib.nullcontext() if name is None else domain(name):
            drift = _drift_of(part)
        if drift is not None:
            found.append(drift)
    return max(found, default=None)


def _drift_of(layer: LayerRecord) -> Drift | None:
    pair = layer.norm.statistics()
    if pair is None or layer.pool is None or layer.pool.mean.shape != pair[0].shape:
        return None
    if not all(bool(value.isfinite().all()) for value in pair) or bool((pair[1] < 0).any()):
        return None  # BN501
    var, eps = layer.pool.variance(), layer.norm.eps or 1e-5
    nats = divergence(layer.pool.mean, var, *pair, eps).mean().item()
    return Drift(nats, 0.5 * ((var + eps) / (pair[1] + eps)).log().mean().item())


def _lags(case: Case) -> dict[str, Drift]:
    """The drifts; of layers behind dropout those without it if they are smaller, as after a layerwise recalibration."""
    found = drifts(case.record)
    if all(drift.nats < at.DRIFT_SUSPECT and abs(drift.log_ratio) < at.LOG_RATIO_SUSPECT for drift in found.values()):
        return found
    passes = case.without_dropout
    without = drifts(passes[1]) if passes is not None else {}
    return {name: min(drift, without.get(name, drift)) for name, drift in found.items()}


def _lag(case: Case) -> Iterator[Found]:
    found = _lags(case)
    worst = worst_first({name: drift.nats for name, drift in found.items()})
    errors = [name for name in worst if found[name].nats >= at.DRIFT_ERROR]
    suspects = [
        name
        for name in worst
        if found[name].nats >= at.DRIFT_SUSPECT or abs(found[name].log_ratio) >= at.LOG_RATIO_SUSPECT
    ]
    held = _foreign(case)
    if held:
        yield _drifted(held, _held_drifts(case.record)[held[0]], "error")
        if _explains(case, held):
            return
    if errors:
        yield _drifted(errors, found[errors[0]], "error")
    elif suspects and (case.loss_ratio or 0) > at.LOSS_RATIO:
        yield _drifted(suspects, found[suspects[0]], "warning")


def _foreign(case: Case) -> list[str]:
    """Held layers whose statistics are so far from the data that the loss suffers; networks may well have learned with a smaller drift."""
    found = {name: drift.nats for name, drift in _held_drifts(case.record).items()}
    names = worst_first(found, at.DRIFT_ERROR)
    if not names or not case.has_loss:
        return []
    return names if (ratio(case.measured, case.measured_with_pools(names)) or 0) > at.LOSS_RATIO else []


def _explains(case: Case, names: list[str]) -> bool:
    """Whether recalibrating these layers brings back most of what recalibrating all does: the others inherit their fault."""
    before, alone = case.measured.loss, case.measured_with_pools(names).loss
    together = case.measured_with_pools([*names, *case.learning]).loss
    if before is None or alone is None or together is None:
        return False
    return before - alone >= at.EXPLAINED * (before - together)


def _drifted(names: list[str], drift: Drift, severity: Severity) -> Found:
    return Found(
        tuple(names),
        {"drift": drift.nats, "log_ratio_of_deviations": drift.log_ratio},
        f"running statistics are {drift.nats:.3g} nats from the data",
        severity,
    )


def _initial_share(norm: Norm) -> float:
    """The weight of the initial values in the running statistics; 0 where it cannot be known, or where they were replaced."""
    pair, momentum, batches = norm.statistics(), norm.momentum, norm.batches
    if pair is None or momentum is None or not batches or not 0 < momentum < 1:
        return 0.0
    share = math.exp(batches * math.log1p(-momentum))
    # The initial variance is 1, so no variance can be below its share, unless somebody recalibrated or copied.
    return share if bool((pair[1] >= share * (1 - 1e-3)).all()) else 0.0


def _few_updates(case: Case) -> Iterator[Found]:
    shares = {norm.name: _initial_share(norm) for norm in case.norms if norm.updates and norm.kind in ("torch", "ours")}
    names = worst_first(shares, at.INITIAL_SHARE)
    if names and not case.arguments.missing(("loader",)) and case.runs:
        measured = drifts(case.record)
        names = [name for name in names if name not in measured or measured[name].nats >= at.DRIFT_SUSPECT]
    if names:
        share = shares[names[0]]
        norm = next(norm for norm in case.norms if norm.name == names[0])
        yield Found(
            tuple(names),
            {"initial_share": share, "batches": norm.batches or 0, "momentum": norm.momentum or 0.0},
            f"after {norm.batches} batches with momentum {norm.momentum:g}, {share:.0%} of the running statistics are "
            "still their initial values",
            "warning" if share > at.MOSTLY_INITIAL and norm.learned else "note",
        )


def _never(case: Case) -> Iterator[Found]:
    names = [
        norm.name
        for norm in case.norms
        if norm.updates and norm.learned and not norm.started and norm.momentum != 0 and not norm.batches
    ]
    if names:
        yield Found(
            tuple(names),
            {"layers": len(names)},
            "weight and bias are trained, but the running statistics are still 0 and 1: buffers were not loaded, copied "
            "or estimated",
            "error" if _would_help(case, names) else "note",
        )


def _would_help(case: Case, names: list[str]) -> bool:
    """Whether statistics would lower the loss; without a loss, whether the layers are used: a new network may draw its affine."""
    if case.has_loss:
        return (ratio(case.measured, case.measured_with_pools(names)) or 0) > at.LOSS_RATIO
    return not any(norm.module.training for norm in case.norms if norm.name in names)


def _dropout(case: Case) -> Iterator[Found]:
    passes = case.without_dropout
    if passes is None:
        return
    on, off = passes
    found = dict[str, float]()
    for name, layer in on.layers.items():
        other = off.layers.get(name)
        if not layer.trained or layer.pool is None or other is None or other.pool is None:
            continue
        if _is_of(other):
            continue
        eps = layer.norm.eps or 1e-5
        log_ratio = 0.5 * ((other.pool.variance() + eps) / (layer.pool.variance() + eps)).log()
        found[name] = float(log_ratio.median())
    names = [
        name for name in found if abs(found[name]) > at.DROPOUT
    ]  # in the order of calls: the first causes the others
    if names:
        yield Found(
            tuple(names),
            {"log_ratio_of_deviations": found[names[0]]},
            f"without dropout the standard deviation of the input is {math.exp(found[names[0]]):.2f} times that in training",
        )


def _is_of(layer: LayerRecord) -> bool:
    """Whether the running deviations are those of this pass."""
    pair, pool = layer.norm.statistics(), layer.pool
    if pair is None or pool is None or pair[1].shape != pool.mean.shape or not layer.norm.started:
        return False
    eps = layer.norm.eps or 1e-5
    return abs(0.5 * float(((pool.variance() + eps) / (pair[1] + eps)).log().median())) <= at.DROPOUT


RULES = (
    Rule(
        "BN201",
        "running statistics lag behind the data, or are those of other data",
        "error",
        ("loader",),
        "In inference a layer normalizes by its running statistics. If they differ from the statistics of the data, "
        "everything after it gets inputs "
        "that it was not trained for. Measured in training mode on the layer's own input, so that a layer does not "
        "inherit the drift of those "
        "before it: the Kullback-Leibler divergence of the data's mean and variance from the running ones, mean over "
        "channels. From .1 nats it is "
        "an error; from .012 nats, or a common change of the deviations by 5 %, a warning if recalibrating lowers the "
        "loss by a third (pass criterion=). Frozen layers count if recalibrating them lowers the loss by as much.",
        "bn.recalibrate(model, loader)",
        "torch.optim.swa_utils.update_bn(loader, model)  # misses the variance between batches",
        _lag,
        fixable=True,
    ),
    Rule(
        "BN202",
        "too few updates",
        "warning",
        (),
        "After n batches the initial values 0 and 1 still have the weight (1 - momentum)^n. Above 5 % it is a note, "
        "above 50 % a warning. Not "
        "reported if a running variance is too small for that weight, since then somebody recalibrated, nor if the "
        "loader shows no drift.",
        "bn.recalibrate(model, loader)",
        "layer.momentum = 0.1  # or None, which averages all batches; then more batches in training mode",
        _few_updates,
        fixable=True,
    ),
    Rule(
        "BN203",
        "statistics were never estimated",
        "error",
        (),
        "The affine is trained and the running statistics are exactly the initial ones: a checkpoint without buffers, "
        "an average of parameters "
        "alone, or a copy by parameters(). A note if recalibrating does not lower the loss by a third, and without a loss in "
        "training mode: some networks draw the affine at random.",
        "bn.recalibrate(model, loader)  # or bn.copy_statistics(source, model)",
        "model.load_state_dict(source.state_dict())  # buffers too",
        _never,
        fixable=True,
    ),
    Rule(
        "BN204",
        "dropout before batch norm",
        "warning",
        ("loader",),
        "Dropout adds variance in training and none in inference, so the running variance is that of other values than "
        "inference sees (Li et al. 2019, "
        "arXiv:1801.05134). Measured by two passes in training mode, with and without dropout "
        "(modules, and calls of torch.nn.functional): median over channels of "
        "the log ratio of the "
        "standard deviations, above .05. Silent where the running deviations are those without dropout, as a layerwise "
        "recalibration leaves them.",
        'bn.recalibrate(model, loader, method="layerwise")  # or move the dropout behind the last batch norm',
        "nn.Sequential(conv, norm, relu, dropout)  # dropout behind the last batch norm",
        _dropout,
    ),
)
