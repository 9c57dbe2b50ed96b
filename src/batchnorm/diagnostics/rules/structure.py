"""BN70: where batch norms stand, and how they are built."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.record import divergence, stacked
from batchnorm.diagnostics.rule import Found, Rule, worst_first


def _stripped(case: Case) -> Iterator[Found]:
    children = {
        norm.name: [name for name, _ in norm.module.named_children()]
        for norm in case.norms
        if type(norm.module) is nn.SyncBatchNorm and any(True for _ in norm.module.children())
    }
    if children:
        names = next(iter(children.values()))
        yield Found(
            tuple(children),
            {"unused_children": ", ".join(names)},
            f"a SyncBatchNorm has submodules ({', '.join(names)}) that it never calls: the layer that it replaced did",
        )


def _dead(case: Case) -> Iterator[Found]:
    shares = dict[str, float]()
    for name, layer in case.record.layers.items():
        eps = layer.norm.eps or 1e-5
        if layer.batches and eps <= at.EPS and layer.trained:
            means, variances = stacked(layer)
            rounding = (2 * layer.precision * means).square()  # new layers may start with any variance
            limit = torch.full_like(means, min(eps, at.DEAD_VARIANCE)) if layer.norm.started else rounding
            shares[name] = float((variances <= limit).all(0).double().mean())
    names = worst_first(shares, at.DEAD_SHARE)
    if names:
        yield Found(
            tuple(names),
            {"share_of_channels": shares[names[0]]},
            f"{shares[names[0]]:.0%} of the channels are constant in every batch",
        )


def _bias(case: Case) -> Iterator[Found]:
    found = dict[str, str]()
    for name, layer in case.record.layers.items():
        if not layer.source or not layer.trained or layer.norm.kind == "hand-written":
            continue
        source = case.inside.get_submodule(layer.source)
        if getattr(source, "bias", None) is not None:
            found[name] = layer.source
    if found:
        name, source = next(iter(found.items()))
        yield Found(
            tuple(found),
            {"layers": len(found)},
            f"the bias of {source or 'the layer'} before {name or 'the model'} has no effect, since the mean is subtracted",
        )


def _shared(case: Case) -> Iterator[Found]:
    found = dict[str, float]()
    for name, layer in case.record.layers.items():
        eps = layer.norm.eps or 1e-5
        for part in layer.by_domain().values():
            pools = [(pool.mean, pool.variance()) for pool in part.calls.values()]
            if not layer.trained or len(pools) < 2:
                continue
            pairs = itertools.islice(itertools.permutations(pools, 2), 64)
            apart = max(divergence(*a, *b, eps).mean().item() for a, b in pairs)
            found[name] = max(apart, found.get(name, apart))
    names = worst_first(found, at.SHARED)
    if names:
        calls = len(case.record.layers[names[0]].calls)
        yield Found(
            tuple(names),
            {"divergence_between_calls": found[names[0]], "calls": calls},
            f"it is called {calls} times in a forward with inputs {found[names[0]]:.3g} nats apart, but has one set of "
            "running statistics",
        )


def _recomputed(case: Case) -> Iterator[Found]:
    found = case.gradients.in_backward if not case.arguments.missing(("criterion",)) else case.stepped.in_backward
    if found:
        yield Found(
            tuple(found),
            {"updates_in_backward": max(found.values())},
            "the running statistics are updated again when activation checkpointing recomputes the forward",
        )


RULES = (
    Rule(
        "BN701",
        "SyncBatchNorm replaced a layer that does more",
        "error",
        (),
        "nn.SyncBatchNorm.convert_sync_batchnorm replaces every subclass of torch's batch norm, and drops what its "
        "forward adds, such as an activation.",
        "bn.synchronize(model)  # on the original model; subclasses keep their forward",
        "convert before you build such layers, or call the activation yourself",
        _stripped,
    ),
    Rule(
        "BN702",
        "dead channels",
        "warning",
        ("loader",),
        "A channel that is constant carries nothing. The share of channels whose variance is below eps, and below 1e-5, in "
        "every batch; healthy networks reach .19. In new layers only channels that are constant but for rounding count.",
        "prune them, or train again with a lower learning rate",
        "prune them, or train again with a lower learning rate",
        _dead,
    ),
    Rule(
        "BN703",
        "a bias without effect",
        "note",
        ("loader",),
        "Batch norm subtracts the mean, and with it the bias of the layer before, whose gradient is 0. Found by the "
        "identity of tensors, not by adjacency. Harmless.",
        "nn.Conv2d(..., bias=False)",
        "nn.Conv2d(..., bias=False)",
        _bias,
        fixable=True,
    ),
    Rule(
        "BN704",
        "one layer in places with different inputs",
        "warning",
        ("loader",),
        "A layer that is called several times in a forward has one set of running statistics, a mixture that fits none "
        "of its inputs. Measured by the "
        "divergence between the moments of its calls.",
        'bn.convert(model, statistics=bn.statistics.Domains(("a", "b")))  # then with bn.domain("a"):',
        "use one batch norm for each place",
        _shared,
    ),
    Rule(
        "BN705",
        "checkpointing updates statistics twice",
        "warning",
        ("loader", "criterion|step"),
        "Activation checkpointing runs the forward again in the backward, and torch's layers update their running "
        "statistics again: the momentum doubles.",
        "bn.convert(model)",
        "layer.momentum = 1 - (1 - layer.momentum) ** 0.5",
        _recomputed,
        fixable=True,
    ),
)
