"""BN8: the optimizer and the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import linear_regression
from typing import Any

from torch import Tensor

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.gradients import euclidean_norm
from batchnorm.diagnostics.rule import Found, Rule, worst_first

_FEWEST_NORMS = 10


def _update(group: dict[str, Any], state: dict[str, Any], grad: Tensor) -> float | None:
    """The length of an update in the long run; None for optimizers other than SGD and Adam's family, and before Adam's first step."""
    rate = float(group["lr"])
    if "betas" not in group:
        return rate * euclidean_norm(grad) / (1 - group["momentum"]) if group.get("momentum", 1) < 1 else None
    if "exp_avg" not in state or "exp_avg_sq" not in state:
        return None
    steps, (first, second) = float(state["step"]), group["betas"]
    mean = state["exp_avg"] / (1 - first**steps)
    return rate * euclidean_norm(mean / ((state["exp_avg_sq"] / (1 - second**steps)).sqrt() + group["eps"]))


def _angle(case: Case) -> Iterator[Found]:
    optimizer = case.arguments.optimizer
    assert optimizer is not None
    groups = {id(value): group for group in optimizer.param_groups for value in group["params"]}
    named, angles = case.gradients.parameters, dict[str, float]()
    grads = {id(value): named[name] for name, value in case.model.named_parameters() if name in named}
    for name, layer in case.record.layers.items():
        weight = None if layer.source is None else getattr(case.inside.get_submodule(layer.source), "weight", None)
        group = groups.get(id(weight))
        grad = grads.get(id(weight))
        if weight is None or group is None or grad is None or not layer.trained:
            continue
        length = _update(group, optimizer.state.get(weight, {}), grad)
        size = euclidean_norm(weight)
        if length is not None and size > 0:
            angles[name] = length / size
    new = {norm.name for norm in case.norms if not norm.started}  # whose first gradients say little about a training
    names = worst_first(
        {name: size for name, size in angles.items() if name not in new or size > at.ANGLE_OF_NEW}, at.ANGLE
    )
    if names:
        yield Found(
            tuple(names),
            {"radians_per_step": angles[names[0]]},
            f"one step turns the weights before it by {angles[names[0]]:.2g} radians: the effective learning rate is too large",
        )


def _decay(case: Case) -> Iterator[Found]:
    optimizer = case.arguments.optimizer
    assert optimizer is not None
    decay = {
        id(value): float(group.get("weight_decay") or 0)
        for group in optimizer.param_groups
        for value in group["params"]
    }
    names = {
        norm.name: most
        for norm in case.norms
        if (most := max((decay.get(id(value), 0.0) for value in norm.affine().values()), default=0.0)) > 0
    }
    if names:
        yield Found(
            tuple(names),
            {"weight_decay": max(names.values())},
            f"weight decay {max(names.values()):g} pulls weight and bias of batch norms to 0",
        )


def _explosion(case: Case) -> Iterator[Found]:
    outputs = {name: size for name, size in case.gradients.outputs.items() if size > 0}
    if len(outputs) < _FEWEST_NORMS:
        return
    first, last = next(iter(outputs)), next(reversed(outputs))
    ratio = outputs[first] / outputs[last]
    if ratio > at.EXPLOSION and _trend(list(outputs.values())) > at.EXPLOSION ** (2 / 3):
        yield Found(
            (first,),
            {"gradient_first_over_last": ratio},
            f"the gradient at {first or 'the model'} is {ratio:.3g} times that at {last}, {len(outputs)} batch norms later",
        )


def _trend(values: list[float]) -> float:
    """First over last value of the exponential that fits best: a scaled branch at either end is no trend."""
    places = range(len(values))
    slope, _ = linear_regression(places, [math.log(value) for value in values])
    return math.exp(-slope * (len(values) - 1))


RULES = (
    Rule(
        "BN801",
        "the effective learning rate is too large",
        "warning",
        ("loader", "criterion", "optimizer"),
        "The scale of a weight before batch norm has no effect, so what counts is the angle by which a step turns it: "
        "lr·‖g‖ / (‖w‖ (1 - momentum)). "
        "It grows as weight decay shrinks the weight. For SGD, and for Adam after its first step. Above .1 radians; above 1 in new layers, "
        "whose first gradients are large.",
        "group['lr'] /= 10  # or less weight decay",
        "group['lr'] /= 10  # or less weight decay",
        _angle,
    ),
    Rule(
        "BN802",
        "weight decay on batch norm",
        "note",
        ("optimizer",),
        "A policy: many recipes leave weight and bias of batch norms without decay.",
        "[{'params': others, 'weight_decay': 1e-4}, {'params': affine, 'weight_decay': 0}]",
        "[{'params': others, 'weight_decay': 1e-4}, {'params': affine, 'weight_decay': 0}]",
        _decay,
    ),
    Rule(
        "BN803",
        "exploding gradients",
        "warning",
        ("loader", "criterion"),
        "In deep networks without residual connections batch norm amplifies gradients layer by layer (Yang et al. 2019, "
        "arXiv:1902.08129). Measured as the "
        "gradient at the first over that at the last of at least ten batch norms, above 1000, if it grows all the way: by 100 "
        "along the exponential that fits best.",
        "add residual connections, or warm the learning rate up",
        "add residual connections, or warm the learning rate up",
        _explosion,
    ),
)
