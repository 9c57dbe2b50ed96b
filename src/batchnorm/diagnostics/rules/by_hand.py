"""BN71: hand-written layers, as in tutorials."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.probes import holding_graphs
from batchnorm.diagnostics.rule import Found, Rule, Severity


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
    found = {name: seen.dependence for name, seen in case.by_hand.items() if seen.dependence > at.MATES}
    if found:
        first = next(iter(found))
        yield Found(
            tuple(found),
            {"relative_change": found[first]},
            f"in inference mode the output for a sample changes by {found[first]:.1%} with its batch: batch statistics "
            "are used there too",
        )


def _detached(case: Case) -> Iterator[Found]:
    found = {name: seen.sum_of_dx for name, seen in case.by_hand.items() if seen.sum_of_dx > at.DETACHED}
    if found:
        first = next(iter(found))
        yield Found(
            tuple(found),
            {"sum_of_dx": found[first]},
            f"no gradient flows through the batch's mean and variance: dx does not sum to 0 but to {found[first]:.1%} of "
            "its size",
        )


def _graphs(case: Case) -> Iterator[Found]:
    found = {norm.name: holding_graphs(norm) for norm in case.norms if norm.kind == "hand-written"}
    if not case.arguments.missing(("loader",)) and case.runs:
        for name, seen in case.by_hand.items():
            found[name] = found[name] or seen.graphs
    names = [name for name, attributes in found.items() if attributes]
    if names:
        attributes = ", ".join(found[names[0]])
        yield Found(
            tuple(names),
            {"attributes": attributes},
            f"{attributes} hold the autograd graphs of all batches, since they are updated with gradients enabled: memory "
            "grows with each step, and copy.deepcopy raises an error",
        )


def _positions(case: Case) -> Iterator[Found]:
    found = {name: seen for name, seen in case.by_hand.items() if seen.position_share < at.POSITIONS}
    if found:
        name, seen = next(iter(found.items()))
        channels = case.record.layers[name].batches[0].mean.numel()
        yield Found(
            tuple(found),
            {"statistics": seen.statistics, "channels": channels, "share_between_positions": seen.position_share},
            f"each position of the input has its own mean and variance, {seen.statistics} of them for {channels} channels, as "
            "from mean(dim=0): batch norm takes them over all dimensions but the channels",
        )


def _biased(case: Case) -> Iterator[Found]:
    sizes = dict[str, float]()
    for name, seen in case.by_hand.items():
        batches = case.record.layers[name].batches
        if seen.biased and batches:
            own = seen.position_share < at.POSITIONS
            sizes[name] = median(batch.samples if own else batch.count for batch in batches)
    names = sorted((name for name, size in sizes.items() if size > 1), key=lambda name: sizes[name])
    if names:
        m = sizes[names[0]]
        harmful = 0.5 * math.log(m / (m - 1)) > at.LOG_RATIO_SUSPECT
        severity: Severity = "warning" if harmful else "note"
        yield Found(
            tuple(names),
            {"values": m, "too_small_by": 1 / m},
            f"the running variance is updated by the biased variance of {m:g} values, on average {1 / m:.1%} too small: "
            "Bessel's correction is missing",
            severity,
        )


RULES = (
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
    Rule(
        "BN714",
        "hand-written: running statistics hold the autograd graph",
        "error",
        (),
        "If the update of the running statistics is recorded by autograd, each batch links its graph to those before, and none is "
        "freed. Found in tensors that have a grad_fn, with a loader also by a call with gradients enabled.",
        "bn.interop.from_tutorial(layer)",
        "with torch.no_grad(): self.running_mean.lerp_(batch_mean, self.momentum)  # or batch_mean.detach()",
        _graphs,
    ),
    Rule(
        "BN715",
        "hand-written: statistics of positions instead of channels",
        "error",
        ("loader",),
        "Batch norm of images (N, C, H, W) has one mean and variance for each channel. mean(dim=0) gives one for each position: far "
        "fewer values for each, inputs of another size raise an error, and gamma and beta, (C,), are multiplied along the width. "
        "Measured by adding a random pattern to the input, the same for all samples: statistics of channels keep it in the output, "
        "those of positions remove it.",
        "bn.BatchNorm2d(C)  # a new layer: statistics of positions cannot be converted",
        "mean = x.mean((0, 2, 3), keepdim=True)  # the variance too; self.gamma.view(1, -1, 1, 1), and beta",
        _positions,
    ),
    Rule(
        "BN716",
        "hand-written: biased running variance",
        "warning",
        ("loader",),
        "The batch is normalized by its variance over m values. As an estimate of the data's variance this is too small by the factor "
        "(m - 1) / m, so inference needs the unbiased one (Ioffe & Szegedy 2015, algorithm 2). Measured by the update of statistics "
        "of 0, whose mean tells the weight of the batch. A warning if deviations are 5 % off, below 11 values; otherwise a note.",
        "bn.interop.from_tutorial(layer)",
        "self.running_var.lerp_(batch_var * m / (m - 1), self.momentum)  # m = x.numel() / C",
        _biased,
    ),
)
