"""Calls of a single layer, and of a sample among others: what do they depend on?"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.diagnostics import thresholds
from batchnorm.diagnostics.norms import Norm
from batchnorm.diagnostics.record import input_of

_FEW = 4  # samples, so that m and m - 1 differ
_MANY = 4096  # values: float32 cannot tell m from m - 1


def dependence(norm: Norm, x: Tensor) -> float:
    """How much the first output changes with the other samples, in inference mode."""
    norm.module.training = False
    others = among_others(x)
    with torch.no_grad():
        return relative_difference(norm.module(x)[0].double(), norm.module(others)[0].double())


def detachment(norm: Norm, x: Tensor) -> float:
    """|sum of dx| over sum of |dx| of the worst channel, in training mode; 0 if the batch is not used."""
    norm.module.training = True
    others = among_others(x)
    with torch.no_grad():
        if relative_difference(norm.module(x)[0].double(), norm.module(others)[0].double()) < thresholds.MATES:
            return 0.0
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        y = norm.module(leaf)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        (dx,) = torch.autograd.grad((y * weights).sum(), leaf)
    dx = input_of(norm, (dx,), {})
    if dx is None:
        return 0.0
    dx = dx.double().transpose(0, 1).flatten(1)  # (C, M)
    return float(dx.sum(1).abs().sum() / dx.abs().sum().clamp(min=1e-30))


def graph_holders(norm: Norm, x: Tensor) -> list[str]:
    """The running statistics, by the layer's names, that hold an autograd graph after a call in training mode."""
    norm.module.training = True
    with torch.enable_grad():
        norm.module(x.clone().requires_grad_())
    return holding_graphs(norm)


def holding_graphs(norm: Norm) -> list[str]:
    """The running statistics, by the layer's names, that hold an autograd graph now."""
    tensors = {role: norm.tensor(role) for role in ("mean", "var")}
    return [norm.name_of(role) for role, value in tensors.items() if value is not None and value.grad_fn is not None]


def position_share(norm: Norm, x: Tensor) -> float:
    """How much of the output's variance in training mode lies between positions, for inputs whose positions differ by a random pattern.

    Statistics of a channel leave the pattern, those of each position (mean over dim=0) remove it. 1 where there are no positions.
    """
    if x.dim() < 3:
        return 1.0
    norm.module.training = True
    pattern = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x) * x.std()
    with torch.no_grad():
        _reset_affine(norm)
        y = input_of(norm, (norm.module(x + pattern),), {})
    if y is None or y.dim() < 3:
        return 1.0
    y = y.double().flatten(2)  # (N, C, S)
    between = y.mean(0).var(1, unbiased=False).mean()
    return float(between / y.var((0, 2), unbiased=False).mean().clamp(min=1e-30))


def updates_by_biased_variance(norm: Norm, x: Tensor) -> bool:
    """Whether the running variance is updated by the variance over m values instead of m - 1, which a small batch shows."""
    before = norm.statistics()
    if before is None:
        return False
    x = x[:_FEW] + 3 * x[:_FEW].std()  # the mean tells the weight of the batch
    norm.module.training = True
    norm.set_statistics(*map(torch.zeros_like, before))
    with torch.no_grad():
        norm.module(x)
    after, values = norm.statistics(), _values_of(norm, x)
    if after is None or values is None or len(values) > _MANY:
        return False
    weights = after[0] / values.mean(0)
    weight = float(weights.median())
    if not 0 < weight <= 1.001 or not bool(((weights - weight).abs() < 1e-3 * weight).all()):
        return False
    share = after[1] / weight ** (2 if norm.keeps_deviations else 1) / values.var(0, unbiased=False)
    return abs(float(share.median()) - 1) < 0.1 / (len(values) - 1)


def _values_of(norm: Norm, x: Tensor) -> Tensor | None:
    """The values of each statistic that the layer has, of a channel or of a position, (m, statistics); None if they are others."""
    pair, channels = norm.statistics(), input_of(norm, (x,), {})
    if pair is None or channels is None:
        return None
    size = pair[0].numel()
    for values in (channels.transpose(0, 1).flatten(1).T, x.flatten(1)):
        if values.shape[1] == size:
            return values.double()
    return None


def _reset_affine(norm: Norm) -> None:
    for role, value in norm.affine().items():
        value.fill_(1.0 if role == "weight" else 0.0)


def among_others(x: Tensor) -> Tensor:
    """The first sample with other samples, in a batch of the same size, so that dropout draws the same."""
    others = x.roll(1, 0)
    if others.is_floating_point():
        others = others * 0.5
    others[0] = x[0]
    return others


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value; infinite if one has a NaN where the other has none."""
    a, b = a.double(), b.double()
    if not bool((a.isfinite() == b.isfinite()).all()):
        return float("inf")
    finite = a.isfinite()
    if not bool(finite.any()):
        return 0.0
    return float((a - b)[finite].abs().max() / a[finite].abs().max().clamp(min=1e-30))
