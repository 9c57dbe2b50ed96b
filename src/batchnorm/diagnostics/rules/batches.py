"""BN4: what is in the batches, and how many values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.measured import compared, difference, ratio
from batchnorm.diagnostics.record import Batch, LayerRecord, divergence, stacked
from batchnorm.diagnostics.rule import Found, Rule, Severity, worst_first

_FEWEST_BATCHES = 3  # for a comparison between batches
_RARE = 3  # times as many effective samples by the means as by mean and variance: a heavy tail
_OF_ONE_VALUE = {
    "error": "training stops with an error",
    "NaN": "the layer silently returns NaN",
    "bias": "the layer silently returns its bias (beta), whatever the input is",
}


def _single(case: Case) -> Iterator[Found]:
    for name, layer in case.record.layers.items():
        if layer.single and layer.single_output != "value":
            yield Found(
                (name,),
                {"samples": layer.single},
                f"a batch of {layer.single} sample has one value per channel here, which has no variance: "
                + _OF_ONE_VALUE[layer.single_output],
            )


def _varying(layer: LayerRecord) -> Tensor:
    """Which channels vary at all, (C,)."""
    assert layer.pool is not None
    return layer.pool.variance() > (layer.norm.eps or 1e-5)


def _divergences(layer: LayerRecord) -> Tensor | None:
    """Divergence of each batch from the pool in channels that vary, (B, C'); None if there are none."""
    if layer.pool is None or not layer.trained or len(layer.batches) < 2:
        return None
    varying, var = _varying(layer), layer.pool.variance()
    if not bool(varying.any()):
        return None
    means, variances = stacked(layer)
    return divergence(means, variances, layer.pool.mean, var, layer.norm.eps or 1e-5)[:, varying]


def effective_samples(layer: LayerRecord) -> float | None:
    """How many independent values a batch has in a channel, median over channels that vary; None if it cannot be known.

    The divergence of the moments of n independent values from their distribution is 1/n on average, half of it by the mean. Where
    values are rare events, such as words, the variance of a batch says little, and the means alone count.
    """
    found = [value for part in layer.by_domain().values() if (value := _effective_samples(part)) is not None]
    return min(found) * layer.norm.ranks if found else None


def _effective_samples(layer: LayerRecord) -> float | None:
    found = _divergences(layer)
    if found is None:
        return None
    B = len(found)
    both = float(((1 - 1 / B) / found.mean(0).clamp(min=1e-12)).median())
    assert layer.pool is not None
    varying = _varying(layer)
    off = (stacked(layer)[0] - layer.pool.mean).square()[:, varying] / layer.pool.variance()[varying]
    by_means = float(((1 - 1 / B) / off.mean(0).clamp(min=1e-12)).median())
    count = median(batch.count for batch in layer.batches)
    independent = count / 2 < by_means < 2 * count  # far more have means that another batch norm made equal
    return by_means if independent and by_means > _RARE * both else both


def _few(case: Case) -> Iterator[Found]:
    ordered = _ordered_layers(case, 0.25)
    found = {
        name: effective_samples(layer)
        for name, layer in case.record.layers.items()
        if name not in ordered and not layer.norm.averages
    }
    few = {name: value for name, value in found.items() if value is not None and value < at.FEW_SAMPLES}
    if few:
        names = sorted(few, key=lambda name: few[name])
        least, layer = few[names[0]], case.record.layers[names[0]]
        count = median(batch.count for batch in layer.batches)
        yield Found(
            tuple(names),
            {"effective_samples": least, "values_per_channel": count},
            f"the statistics of a batch are as noisy as those of {least:.1f} independent values per channel (it has {count:g})",
            "error" if least < at.FEW_SAMPLES_ERROR else "warning",
        )


def _tail(case: Case) -> Iterator[Found]:
    shares = dict[str, tuple[float, float]]()
    samples = 0
    for name, layer in case.record.layers.items():
        found = _divergences(layer)
        if found is None or len(layer.batches) < _FEWEST_BATCHES or len(layer.by_domain()) > 1:
            continue
        usual = median(batch.samples for batch in layer.batches)
        if layer.batches[-1].samples > usual / 2:
            continue
        effective = 1 / found.median(1).values.clamp(min=1e-12)  # (B,)
        last, share = float(effective[-1]), float(effective[-1] / effective[:-1].median())
        if share < at.TAIL and last < 2 * at.FEW_SAMPLES:
            shares[name], samples = (share, last), layer.batches[-1].samples
    if shares:
        names = sorted(shares, key=lambda name: shares[name])
        share, last = shares[names[0]]
        evidence: dict[str, float | int | str] = {"share_of_effective_samples": share, "effective_samples": last}
        message = (
            f"the last batch has {samples} samples and {share:.1%} of the information of the others, but the same weight "
            "in the running statistics"
        )
        harmful, numbers, text = _harm(case, names)
        severity: Severity = "warning" if harmful else "note"
        yield Found(tuple(names), {**evidence, "samples": samples, **numbers}, message + text, severity)


def _harm(case: Case, names: Sequence[str]) -> tuple[bool, dict[str, float], str]:
    """Whether running statistics whose last batch was the small one are far from those without it, and cost loss if there is one."""
    without, after = dict[str, tuple[Tensor, Tensor]](), dict[str, tuple[Tensor, Tensor]]()
    harmful = False
    for name in names:
        layer = case.record.layers[name]
        assert layer.pool is not None
        last, weight = layer.batches[-1], layer.norm.momentum
        weight = 1 / len(layer.batches) if weight is None else weight
        mean, var = layer.pool.mean, layer.pool.variance()
        unbiased = last.var * last.count / max(last.count - 1, 1)
        without[name] = mean, var
        after[name] = mean.lerp(last.mean, weight), var.lerp(unbiased, weight)
        eps = layer.norm.eps or 1e-5
        log_ratio = 0.5 * ((after[name][1] + eps) / (var + eps)).log().mean().item()
        nats = divergence(mean, var, *after[name], eps).mean().item()
        harmful |= nats >= at.DRIFT_SUSPECT or abs(log_ratio) >= at.LOG_RATIO_SUSPECT
    if not case.has_loss:
        return harmful, {}, ""
    before, mended = case.measured_with(after), case.measured_with(without)
    loss = difference(before.losses, mended.losses)
    numbers, texts = compared(before, mended)
    costs = loss is not None and not loss.is_noise and (ratio(before, mended) or 1) > at.TAIL_LOSS
    return harmful and costs, numbers, f"; dropping it {' and '.join(texts)}" if texts else ""


def _padding(case: Case) -> Iterator[Found]:
    found = {name: layer.padding for name, layer in case.record.layers.items()}
    names = worst_first(found, at.PADDING)
    if names:
        yield Found(
            tuple(names),
            {"share_of_padding": found[names[0]]},
            f"{found[names[0]]:.0%} of the values are constant tails of unequal length: padding counts in the statistics",
        )


def _ratios(batches: Sequence[Batch], varying: Tensor) -> Tensor:
    """Variance of the batches' means over what shuffled samples would have (F) of each channel, (C',)."""
    n = torch.tensor([batch.samples for batch in batches], dtype=torch.float64).unsqueeze(1)  # (B, 1)
    means = torch.stack([batch.sample_mean for batch in batches]).cpu()[:, varying.cpu()]  # (B, C')
    within = torch.stack([batch.sample_var for batch in batches]).cpu()[:, varying.cpu()].sum(0) / (
        n.sum() - len(batches)
    )
    grand = (n * means).sum(0) / n.sum()
    between = (n * (means - grand).square()).sum(0) / (len(batches) - 1)
    return between / within.clamp(min=1e-30)


def _ordered_layers(case: Case, share: float = 0.5) -> Mapping[str, float]:
    """The layers in which a share of the channels differs between batches more than in shuffled ones, with F, in the order of calls."""
    found = dict[str, float]()
    for name, layer in case.record.layers.items():
        for part in layer.by_domain().values():
            batches = [batch for batch in part.batches if batch.samples > 1]
            if part.pool is None or len(batches) < _FEWEST_BATCHES or not bool(_varying(part).any()):
                continue
            ratio = float(_ratios(batches, _varying(part)).quantile(1 - share))
            if ratio - 1 > at.ORDERED * math.sqrt(2 / (len(batches) - 1)):
                found[name] = max(ratio, found.get(name, ratio))
    return found


def _ordered(case: Case) -> Iterator[Found]:
    found = _ordered_layers(case)
    if not found and not _leaks(case):
        found = _ordered_layers(case, 0.25)
    if found:
        first = next(iter(found))
        yield Found(
            tuple(found),
            {"F": found[first]},
            f"the means of the batches vary {found[first]:.3g} times as much as those of shuffled samples: batches of "
            "one class or domain",
        )


def _leaks(case: Case) -> bool:
    """Whether the loss in training mode depends on who is in a batch, though the batches are not of one class or domain."""
    if case.arguments.missing(("criterion",)) or case.dealt_losses is None or _ordered_layers(case):
        return False
    ordered, dealt = case.dealt_losses
    return dealt > at.LEAK * ordered and dealt - ordered > at.LEAK_DIFFERENCE and not case.drawn_at_random


def _leak(case: Case) -> Iterator[Found]:
    if not _leaks(case) or case.dealt_losses is None:
        return
    ordered, dealt = case.dealt_losses
    names = tuple(name for name, layer in case.record.layers.items() if layer.trained)
    yield Found(
        names,
        {"loss_as_ordered": ordered, "loss_dealt_anew": dealt},
        f"the loss in training mode is {ordered:.3g} with the loader's batches and {dealt:.3g} with the same samples "
        "dealt anew: the batch tells the answer",
    )


def _accumulation(case: Case) -> Iterator[Found]:
    stepped = case.stepped
    if not stepped.steps or not stepped.forwards:
        return
    updates = {name: n / stepped.steps for name, n in stepped.updates.items() if n <= stepped.forwards}
    many = {name: value for name, value in updates.items() if value >= 2}
    if many:
        names = worst_first(many)
        most = many[names[0]]
        yield Found(
            tuple(names),
            {"updates_per_step": most},
            f"{most:g} updates of the running statistics for each step of the optimizer: each forward normalizes by its own "
            "micro-batch",
            "warning" if most >= at.ACCUMULATION else "note",
        )


RULES = (
    Rule(
        "BN401",
        "one value per channel",
        "error",
        ("loader",),
        "One value has no variance. It comes from a last batch of one sample, or from pooling to 1x1 with a batch of one. "
        "torch's layers raise an error; hand-written ones return beta, or NaN if their variance is unbiased.",
        'DataLoader(..., drop_last=True)  # or bn.convert(model), and layer.on_single = "running"',
        "DataLoader(..., drop_last=True)",
        _single,
    ),
    Rule(
        "BN402",
        "too few samples per batch",
        "error",
        ("loader",),
        "The noise of batch statistics depends on how many independent values they have. The batch size alone says "
        "little: pixels of an image are "
        "correlated, and a batch of 2 with large maps can do. Measured by how far the batches' moments spread about "
        "their pool: n independent values "
        "diverge by 1/n nats. Below 16 (median over channels) a warning, below 4 an error; healthy networks have 35 and more.",
        "bn.synchronize(model)  # over ranks; or bn.statistics.MovingAverage, bn.freeze(model)",
        "nn.SyncBatchNorm.convert_sync_batchnorm(model)  # or nn.GroupNorm",
        _few,
    ),
    Rule(
        "BN403",
        "a small last batch",
        "warning",
        ("loader",),
        "The last batch of an epoch has the same weight in the running statistics as any other, and the most recent one "
        "before a validation. Measured by its effective samples, below 15 % of the others'. A warning if running statistics "
        "that end with it are .012 nats or 5 % of the deviations off, and cost 5 % of the loss if there is one; otherwise a note.",
        "DataLoader(..., drop_last=True)",
        "DataLoader(..., drop_last=True)",
        _tail,
    ),
    Rule(
        "BN404",
        "padding counts in the statistics",
        "warning",
        ("loader",),
        "Sequences of unequal length are filled up with a constant, which shifts mean and variance by how much there is "
        "of it. Measured as the "
        "share of values in constant tails of unequal length, less the same at the beginning, since borders of images "
        "are on both sides.",
        "layer(x, lengths=lengths)  # or mask=",
        "layer(x[mask])  # the values of all sequences without padding, (M, C)",
        _padding,
    ),
    Rule(
        "BN405",
        "batches of one class or domain",
        "warning",
        ("loader",),
        "A batch of one class is normalized by the statistics of that class, which removes what distinguishes it; in "
        "inference they are others. Measured "
        "by the F ratio of the samples' means, between batches over within: the median over channels, or the upper quartile if no "
        "median is large and BN406 is silent. It is 1 for shuffled "
        "samples, give or take sqrt(2 / (batches - 1)). Reported if it exceeds 1 by five times that.",
        'DataLoader(..., shuffle=True)  # or bn.convert(model, statistics=bn.statistics.Domains(("a", "b")))  # then with bn.domain("a"):',
        "DataLoader(..., shuffle=True)",
        _ordered,
    ),
    Rule(
        "BN406",
        "the batch tells the answer",
        "warning",
        ("loader", "criterion"),
        "If samples of a batch belong together, a network can read the answer from the batch's statistics, which it "
        "cannot in inference. Measured by "
        "the loss in training mode, with batches as the loader has them and dealt anew. Reported if means or squares of the "
        "inputs, or the classes, also differ more between the batches than chance explains: a network that learned batches of "
        "shuffled samples by heart prefers them too.",
        "DataLoader(..., shuffle=True)",
        "DataLoader(..., shuffle=True)",
        _leak,
    ),
    Rule(
        "BN407",
        "accumulated gradients are not a big batch",
        "warning",
        ("loader", "step"),
        "Gradients of micro-batches add up to one step, but each is normalized by its own statistics, and the running "
        "statistics are updated as often. "
        "From 4 updates per step a warning; 2 or 3 are a note, as for a discriminator that gets real and fake samples apart.",
        "with bn.accumulate(steps): ...  # or bn.as_one_batch(forward, parts)",
        "layer.momentum = 1 - (1 - layer.momentum) ** (1 / steps)  # the running statistics only",
        _accumulation,
    ),
)
