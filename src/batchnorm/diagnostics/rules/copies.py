"""BN6: models that should agree: averages, target networks, ports, folded models, replicas."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.norms import Norm, has_values, norms_of
from batchnorm.diagnostics.record import divergence
from batchnorm.diagnostics.rule import Found, Rule, Severity, worst_first
from batchnorm.diagnostics.rules.running import drifts
from batchnorm.surgery.averages import without_wrappers

_CONVENTIONS: tuple[tuple[str, Severity], ...] = (("eps", "error"), ("momentum", "warning"))


def _pairs(case: Case, other: nn.Module) -> list[tuple[Norm, Norm]]:
    """The layers of both models that have one name, without the prefixes of wrappers."""
    others = {without_wrappers(norm.name): norm for norm in norms_of(other)}
    mine = [(norm, others.get(without_wrappers(norm.name))) for norm in case.norms]
    return [(norm, found) for norm, found in mine if found is not None]


def _buffer_distance(a: Norm, b: Norm) -> float:
    """How far the running statistics of two layers are apart, in standard deviations; 0 if one has none."""
    mine, others = a.statistics(), b.statistics()
    if mine is None or others is None or mine[0].shape != others[0].shape:
        return 0.0
    eps = a.eps or 1e-5
    nats = max(divergence(*mine, *others, eps).mean().item(), divergence(*others, *mine, eps).mean().item())
    return math.sqrt(2 * max(nats, 0.0)) if math.isfinite(nats) else math.inf


def _parameter_distance(case: Case, other: nn.Module) -> float:
    """The difference of all parameters over their size."""
    others = {without_wrappers(name): value for name, value in other.named_parameters()}
    difference = size = 0.0
    for name, value in case.model.named_parameters():
        found = others.get(without_wrappers(name))
        if found is not None and found.shape == value.shape:
            difference += float((value.detach().double() - found.detach().double().to(value.device)).square().sum())
            size += float(value.detach().double().square().sum())
    return math.sqrt(difference / size) if size else 0.0


def _apart(case: Case, other: nn.Module) -> dict[str, float]:
    """Layers whose buffers are further apart than their parameters explain, with the distance, the largest first."""
    parameters = max(_parameter_distance(case, other), 1e-6)
    found = dict[str, float]()
    for mine, others in _pairs(case, other):
        distance = _buffer_distance(mine, others)
        if distance**2 / 2 > at.DRIFT_SUSPECT and distance / parameters > at.COPY_DISTANCE:
            found[mine.name] = distance
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _stale(case: Case) -> Iterator[Found]:
    twin = case.arguments.twin
    assert twin is not None
    evidence: dict[str, float | int | str] = {"distance_of_parameters": _parameter_distance(case, twin)}
    if (
        not case.arguments.missing(("loader",))
        and all(map(has_values, (*twin.parameters(), *twin.buffers())))
        and _pairs(case, twin)
    ):
        measured = drifts(case.twin_record, initial=True)
        known = {without_wrappers(name): drift.nats for name, drift in measured.items()}
        started = [mine.name for mine, other in _pairs(case, twin) if mine.started or other.started]
        names = [name for name in started if known.get(without_wrappers(name), 0.0) > at.DRIFT_SUSPECT]
        names.sort(key=lambda name: -known[without_wrappers(name)])
        if names:
            nats = known[without_wrappers(names[0])]
            message = f"the running statistics of the twin are {nats:.3g} nats from what its weights make of the data"
            yield Found(tuple(names), {**evidence, "drift_of_twin": nats}, message)
        return
    apart = _apart(case, twin)
    if apart:
        first = next(iter(apart))
        evidence["distance_of_buffers"] = apart[first]
        yield Found(
            tuple(apart),
            evidence,
            f"running statistics of model and twin are {apart[first]:.3g} deviations apart, their parameters only "
            f"{evidence['distance_of_parameters']:.3g} of their size",
        )


def _conventions(case: Case) -> Iterator[Found]:
    twin = case.arguments.twin
    assert twin is not None
    pairs = [(mine, other) for mine, other in _pairs(case, twin) if mine.kind != "frozen" and other.kind != "frozen"]
    for attribute, severity in _CONVENTIONS:
        found = [(mine, other) for mine, other in pairs if _differ(getattr(mine, attribute), getattr(other, attribute))]
        if found:
            mine, other = (getattr(norm, attribute) for norm in found[0])
            yield Found(
                tuple(norm.name for norm, _ in found),
                {attribute: mine, f"{attribute}_of_twin": other},
                f"{attribute} is {mine:g}, but {other:g} in the twin",
                severity,
            )


def _differ(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and not math.isclose(a, b, rel_tol=0.01)


def _folded(case: Case) -> Iterator[Found]:
    twin = case.arguments.twin
    assert twin is not None
    paired = {norm.name for norm, _ in _pairs(case, twin)}
    names = tuple(norm.name for norm in case.norms if norm.name not in paired)
    if not names or not case.runs:
        return
    difference = case.twin_outputs
    if difference is not None and difference > at.COPY_OUTPUT:
        yield Found(
            names,
            {"relative_difference": difference},
            f"in inference mode the outputs of the twin, which has no such batch norms, differ by {difference:.2g} of "
            "the largest",
        )


def _replicas(case: Case) -> Iterator[Found]:
    replicas = case.arguments.replicas
    assert replicas is not None
    worst = dict[str, float]()
    for replica in replicas:
        for name, distance in _apart(case, replica).items():
            worst[name] = max(worst.get(name, 0.0), distance)
    if worst:
        names = worst_first(worst)
        yield Found(
            tuple(names),
            {"distance_of_buffers": worst[names[0]], "replicas": len(replicas)},
            f"running statistics of the replicas are up to {worst[names[0]]:.3g} deviations apart, though their parameters agree",
        )


RULES = (
    Rule(
        "BN601",
        "a copy with the buffers of another model",
        "error",
        ("twin",),
        "An average of weights (EMA, SWA) or a target network is made of parameters. Its running statistics are neither "
        "copied nor estimated for the new "
        "weights. With a loader, the twin's statistics are compared with its own inputs in training mode; without one, "
        "the distance of buffers "
        "with that of parameters.",
        "bn.recalibrate(twin, loader)  # or bn.copy_statistics(model, twin)",
        "torch.optim.swa_utils.update_bn(loader, twin)  # or AveragedModel(model, use_buffers=True)",
        _stale,
        fixable=True,
    ),
    Rule(
        "BN602",
        "a port with other conventions",
        "error",
        ("twin",),
        "Libraries differ in eps (1e-5 or 1e-3) and in what momentum weighs (torch's .1 is Keras's .9). Another eps "
        "changes every output, another momentum only "
        "training.",
        "layer.eps = twin_layer.eps  # bn.interop.from_keras(layer) reads both",
        "layer.eps = twin_layer.eps",
        _conventions,
        fixable=True,
    ),
    Rule(
        "BN603",
        "a folded model that computes something else",
        "error",
        ("loader", "twin"),
        "Folding a batch norm into its neighbor keeps the outputs in inference mode. Folding in training mode, before "
        "padding, or with the wrong variance does not.",
        "folded, report = bn.fold(model, example_input)  # checks itself",
        "torch.nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())",
        _folded,
    ),
    Rule(
        "BN611",
        "replicas with different running statistics",
        "error",
        ("replicas",),
        "Ranks, or clients of federated learning, share parameters but not buffers. Which checkpoint is written then "
        "decides what inference computes.",
        "bn.average_buffers(model)  # or bn.synchronize(model)",
        "for buffer in model.buffers(): dist.all_reduce(buffer, dist.ReduceOp.AVG)  # misses the variance between ranks",
        _replicas,
        fixable=True,
    ),
)
