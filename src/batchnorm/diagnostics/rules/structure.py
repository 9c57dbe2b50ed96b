"""BN7: where batch norms stand, and how they are built."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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
            limit = min(eps, at.DEAD_VARIANCE) if layer.norm.started else eps * at.CONSTANT
            shares[name] = float((stacked(layer)[1] < limit).all(0).double().mean())
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
        pools = [(pool.mean, pool.variance()) for pool in layer.calls.values()]
        if not layer.trained or len(pools) < 2:
            continue
        pairs = itertools.islice(itertools.permutations(pools, 2), 64)
        found[name] = max(divergence(*a, *b, eps).mean().item() for a, b in pairs)
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


def _no_buffers(case: Case) -> Iterator[Found]:
    names, loose = list[str](), ""
    for norm in case.norms:
        if norm.kind != "hand-written":
            continue
        known = {id(value) for value in (*norm.module.parameters(), *norm.module.buffers())}
        missing = [
            role
            for role in ("mean", "var", "weight", "bias")
            if (value := norm.tensor(role)) is not None and id(value) not in known
        ]
        if missing:
            names.append(norm.name)
            loose = loose or ", ".join(norm.name_of(role) for role in missing)
    if names:
        yield Found(
            tuple(names),
            {"attributes": loose},
            f"{loose} are neither parameters nor buffers: state_dict(), .to() and the optimizer do not know them",
        )


def _always_batch(case: Case) -> Iterator[Found]:
    found = {name: change for name, (change, _) in case.by_hand.items() if change > at.MATES}
    if found:
        first = next(iter(found))
        yield Found(
            tuple(found),
            {"relative_change": found[first]},
            f"in inference mode the output for a sample changes by {found[first]:.1%} with its batch: batch statistics "
            "are used there too",
        )


def _detached(case: Case) -> Iterator[Found]:
    found = {name: sums for name, (_, sums) in case.by_hand.items() if sums > at.DETACHED}
    if found:
        first = next(iter(found))
        yield Found(
            tuple(found),
            {"sum_of_dx": found[first]},
            f"no gradient flows through the batch's mean and variance: dx does not sum to 0 but to {found[first]:.1%} of "
            "its size",
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
        "every batch; healthy networks reach .19. In new layers only constant channels count.",
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
    Rule(
        "BN711",
        "hand-written: state that is not registered",
        "error",
        (),
        "Tensors that are plain attributes are not saved, not moved to a device, and gamma and beta not trained.",
        "bn.interop.from_tutorial(layer)",
        'self.register_buffer("running_mean", torch.zeros(C))',
        _no_buffers,
    ),
    Rule(
        "BN712",
        "hand-written: always batch statistics",
        "error",
        ("loader",),
        "Without a branch on self.training the layer normalizes by the batch in inference too, so a prediction depends "
        "on its batch.",
        "bn.interop.from_tutorial(layer)",
        "mean, var = (batch_mean, batch_var) if self.training else (self.running_mean, self.running_var)",
        _always_batch,
    ),
    Rule(
        "BN713",
        "hand-written: detached batch statistics",
        "error",
        ("loader",),
        "Mean and variance depend on x, so the gradient has to flow through them (Ioffe & Szegedy 2015, section 3). If "
        "they are detached or computed "
        "under no_grad, dx does not sum to 0 over the batch, and the mean of activations can grow without bound.",
        "bn.interop.from_tutorial(layer)",
        "mean = x.mean(0)  # without detach() and no_grad()",
        _detached,
    ),
)
