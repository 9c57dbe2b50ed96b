"""Whether batches can have been drawn at random from their samples: what the samples of a batch share, its statistics tell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_CHANCE = 0.05  # of an alarm about batches drawn at random, over all features
_MOST_CLASSES = 1000


def are_drawn_at_random(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
    """Whether means and squares of inputs, and classes of targets, differ between batches no more than those of shuffled samples.

    The F ratio of each feature, variance between batches over that within, is compared with the largest that chance explains among
    as many features.

    Args:
        inputs: of B batches, (N, ...) each.
        targets: of the same batches, (N, ...) each.
    """
    tables = [torch.cat([_features(x), _classes(y, targets)], 1) for x, y in zip(inputs, targets, strict=True)]
    ratios = _ratios(tables)
    return not len(ratios) or float(ratios.max()) <= _largest_by_chance(len(ratios), len(tables) - 1)


def _features(x: Tensor) -> Tensor:
    """Numbers of each sample, (N, features) float64: values of rows, means of channels, and their squares."""
    if not x.is_floating_point() or x.dim() < 2:
        return torch.empty(len(x), 0, dtype=torch.float64)
    values = x.detach().double().cpu()
    if x.dim() == 2:
        return torch.cat([values, values.square()], 1)
    values = values.flatten(2)  # (N, C, S)
    return torch.cat([values.mean(2), values.square().mean(2)], 1)


def _classes(y: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Which class a sample has, (N, classes) float64; no columns where targets are no classes."""
    classes = 1 + max(int(each.max()) for each in targets) if y.dim() == 1 and not y.is_floating_point() else 0
    if not 1 < classes <= _MOST_CLASSES or any(bool((each < 0).any()) for each in targets):
        return torch.empty(len(y), 0, dtype=torch.float64)
    return F.one_hot(y.detach().cpu().long(), classes).double()


def _ratios(tables: Sequence[Tensor]) -> Tensor:
    """F of each feature that varies within batches, or is the same in each: then it tells the batch, and F is infinite."""
    n = torch.tensor([len(table) for table in tables], dtype=torch.float64).unsqueeze(1)  # (B, 1)
    means = torch.stack([table.mean(0) for table in tables])  # (B, features)
    within = torch.stack([(table - table.mean(0)).square().sum(0) for table in tables]).sum(0) / (n.sum() - len(tables))
    between = (n * (means - (n * means).sum(0) / n.sum()).square()).sum(0) / (len(tables) - 1)
    varies = (within > 0) | (between > 0)
    return between[varies] / within[varies]


def _largest_by_chance(features: int, batches: int) -> float:
    """The largest of many chi-square values over their degrees of freedom, by the cube root of Wilson and Hilferty (1931)."""
    z = math.sqrt(2 * math.log(features / _CHANCE))
    spread = 2 / (9 * batches)
    return (1 - spread + z * math.sqrt(spread)) ** 3
