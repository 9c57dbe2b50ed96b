"""Loss and accuracy of a model over some batches, and what lies between two such measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Measured(NamedTuple):
    """Loss and accuracy over some batches.

    Attributes:
        losses: of the batches, (B,) float64; empty without a loss.
        hits: share of right answers for each sample, (N,) float64; empty where answers cannot be compared with targets.
    """

    losses: Tensor
    hits: Tensor

    @property
    def loss(self) -> float | None:
        """Mean over the batches."""
        return self.losses.mean().item() if len(self.losses) else None

    @property
    def accuracy(self) -> float | None:
        """Mean over the samples."""
        return self.hits.mean().item() if len(self.hits) else None


def measured(items: Iterable[Any], look: Callable[[Any], tuple[Tensor | None, Any]]) -> Measured:
    """Measure items; `look(item)` returns a loss and the output, each may be None."""
    losses, hits = list[float](), list[Tensor]()
    for item in items:
        loss, output = look(item)
        if loss is not None:
            losses.append(float(loss))
        right = hits_of(output, item)
        if right is not None:
            hits.append(right)
    empty = torch.empty(0, dtype=torch.float64)
    return Measured(torch.tensor(losses, dtype=torch.float64), torch.cat(hits) if hits else empty)


def hits_of(output: Any, item: Any) -> Tensor | None:
    """The share of right answers for each sample, (N,); None unless outputs are classes, or scores of them, and targets integers."""
    target = item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None
    given = next((value for value in tree_leaves(output) if isinstance(value, Tensor)), None)
    if not isinstance(target, Tensor) or given is None or target.is_floating_point() or not target.dim():
        return None
    target = target.detach().cpu()
    if given.dim() == target.dim() + 1 and given.is_floating_point() and given.shape[1] > 1:  # (N, classes, ...)
        if target.amax() >= given.shape[1]:
            return None
        given = given.detach().argmax(1)
    given = given.detach().cpu()
    if given.shape != target.shape or given.is_floating_point():
        return None
    counted = (target >= 0).flatten(1 if target.dim() > 1 else 0)  # below 0: to be ignored
    right = (given == target).flatten(1 if target.dim() > 1 else 0) & counted
    if target.dim() == 1:
        return right[counted].double()
    return right.sum(1).double() / counted.sum(1).clamp(min=1)


class Difference(NamedTuple):
    """How much smaller one is than the other, with its standard error over batches or samples, which both share.

    Attributes:
        value: the mean difference.
        noise: its standard error; infinite if there is one value only.
    """

    value: float
    noise: float

    @property
    def is_noise(self) -> bool:
        """Whether it is within two standard errors of 0."""
        return abs(self.value) <= 2 * self.noise


def difference(larger: Tensor, smaller: Tensor) -> Difference | None:
    """The mean of `larger` - `smaller`, (N,) each; None if there are none, or not the same number."""
    if not len(larger) or larger.shape != smaller.shape:
        return None
    values = larger - smaller
    noise = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Difference(float(values.mean()), noise)


def ratio(larger: Measured, smaller: Measured) -> float | None:
    """Loss over loss; None unless both are there and positive."""
    return larger.loss / smaller.loss if larger.loss is not None and smaller.loss else None


def compared(before: Measured, after: Measured, whole: Measured | None = None) -> tuple[dict[str, float], list[str]]:
    """The numbers of both, and a phrase for each that could be measured; `whole` is what mending everything would give."""
    evidence, texts = dict[str, float](), list[str]()
    accuracy = difference(after.hits, before.hits)
    if accuracy is not None and before.accuracy is not None and after.accuracy is not None:
        evidence |= {"accuracy_before": before.accuracy, "accuracy_after": after.accuracy}
        evidence |= {"accuracy_noise": accuracy.noise}
        points, noise = 100 * accuracy.value, 100 * accuracy.noise
        of = f" of {100 * (whole.accuracy - before.accuracy):.1f}" if whole and whole.accuracy is not None else ""
        if accuracy.is_noise:
            texts.append(f"changes the accuracy by no more than its noise ({points:+.1f} ± {noise:.1f} points)")
        else:
            verb = "brings back" if points > 0 else "costs"
            texts.append(f"{verb} {abs(points):.1f}{of} points of accuracy (± {noise:.1f})")
    loss = difference(before.losses, after.losses)
    if loss is not None and before.loss is not None and after.loss is not None:
        evidence |= {"loss_before": before.loss, "loss_after": after.loss, "loss_noise": loss.noise}
        texts.append(f"changes the loss from {before.loss:.3g} to {after.loss:.3g}")
        if whole and whole.loss is not None:
            evidence["loss_after_all"] = whole.loss
            texts[-1] += f" (all layers: {whole.loss:.3g})"
    return evidence, texts
