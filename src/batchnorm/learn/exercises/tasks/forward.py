"""Task 2: the forward of (N, C)."""

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.language import marked, tr
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, Variants, Wrong, agree, judge, normal
from batchnorm.learn.exercises.task import Task

EPS = 0.1  # so large that a wrong place for it shows
FAR = 1e6  # a mean at which E[x²] - E[x]² has four digits left


def check(learner: Learner) -> None:
    """Random inputs, first a square one, on which torch does not notice wrong axes; at last one far from 0."""
    for seed, (N, C) in enumerate(((4, 4), (5, 3), (2, 1))):
        x, gamma, beta = 2 * normal(seed, N, C) + 1, normal(seed + 10, C), normal(seed + 20, C)
        (y,) = learner.call("forward", (x, gamma, beta, EPS), (N, C))
        judge("forward", y, reference.forward(x, gamma, beta, EPS).y, variants(x, gamma, beta, EPS))
    x, one, zero = normal(3, 64, 1) + FAR, torch.ones(1).double(), torch.zeros(1).double()
    (y,) = learner.call("forward", (x, one, zero, EPS), (64, 1))
    if not agree(y, reference.forward(x, one, zero, EPS).y):  # only the cancellation is left to be wrong
        raise Wrong(tr(why.SQUARES_CANCEL))


def variants(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Variants:
    """What the misconceptions give for x (N, C)."""
    mean, variance = x.mean(0), x.var(0, correction=0)
    xhat = (x - mean) / (variance + eps).sqrt()

    def affine(normalized: Tensor) -> Tensor:
        return gamma * normalized + beta

    def over(axes: tuple[int, ...]) -> Tensor:
        return affine((x - x.mean(axes, keepdim=True)) / (x.var(axes, correction=0, keepdim=True) + eps).sqrt())

    return {
        why.VARIANCE_FOR_ROOT: lambda: affine((x - mean) / (variance + eps)),
        why.EPSILON_OUTSIDE: lambda: affine((x - mean) / (variance.sqrt() + eps)),
        why.EPSILON_FORGOTTEN: lambda: affine((x - mean) / variance.sqrt()),
        why.UNBIASED_IN_NORMALIZATION: lambda: affine((x - mean) / (x.var(0) + eps).sqrt()),
        why.NOT_CENTERED: lambda: affine(x / (variance + eps).sqrt()),
        why.SIGN: lambda: affine(-xhat),
        why.GAMMA_FORGOTTEN: lambda: xhat + beta,
        why.BETA_FORGOTTEN: lambda: gamma * xhat,
        why.GAMMA_AND_BETA_EXCHANGED: lambda: beta * xhat + gamma,
        why.SAMPLE_STATISTICS: lambda: over((1,)),
        why.SAMPLES_TAKEN_FOR_CHANNELS: lambda: affine((x - x.mean(1)) / (x.var(1, correction=0) + eps).sqrt()),
        why.ONE_MEAN_FOR_ALL: lambda: over((0, 1)),
    }


TASK = Task(
    2,
    "forward",
    marked("the forward of a mini-batch (N, C)"),
    (
        marked(
            "Write forward(x, gamma, beta, eps) for x of shape (N, C), gamma and beta of shape (C,): normalize every channel by the "
            "statistics of the mini-batch, then scale and shift it. Return y of shape (N, C). Use torch, or import NumPy and use that; no "
            "ready batch_norm."
        ),
    ),
    ("forward",),
    (
        marked("A channel is a column. Which dim do you average over, so that C numbers are left?"),
        marked(
            "The variance here is biased: torch.var divides by m - 1 unless you say correction=0. eps goes under the root."
        ),
        marked(
            "mean = x.mean(0); variance = ((x - mean) ** 2).mean(0); then (x - mean) / sqrt(variance + eps), times gamma, plus beta."
        ),
    ),
    check,
)
