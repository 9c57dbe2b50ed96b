"""Task 3: the backward of (N, C) by hand."""

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.language import marked
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, Variants, judge, normal
from batchnorm.learn.exercises.task import Task

EPS = 0.1


def check(learner: Learner) -> None:
    """Against autograd through the reference, in float64."""
    for seed, (N, C) in enumerate(((4, 4), (5, 3))):
        x, dy, gamma = 2 * normal(seed, N, C) + 1, normal(seed + 10, N, C) + 0.5, normal(seed + 20, C)
        found = learner.call("backward", (dy, x, gamma, EPS), (N, C), (C,), (C,))
        dx, dgamma, dbeta = gradients(dy, x, gamma)
        exchanged = {why.GRADIENTS_EXCHANGED: lambda dgamma=dgamma: dgamma}
        averaged = {why.GRADIENTS_AVERAGED: lambda dbeta=dbeta, N=N: dbeta / N}
        judge("dbeta", found[2], dbeta, exchanged | averaged)
        judge("dgamma", found[1], dgamma, _of_gamma(dy, x, dgamma))
        judge("dx", found[0], dx, _of_x(dy, x, gamma, dx))


def gradients(dy: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma, dbeta by autograd."""
    leaves = [each.clone().requires_grad_() for each in (x, gamma, torch.zeros_like(gamma))]
    dx, dgamma, dbeta = torch.autograd.grad(reference.forward(*leaves, eps=EPS).y, leaves, dy)
    return dx, dgamma, dbeta


def _of_gamma(dy: Tensor, x: Tensor, dgamma: Tensor) -> Variants:
    return {
        why.GAMMA_GRADIENT_WITH_X: lambda: (dy * x).sum(0),
        why.GRADIENTS_AVERAGED: lambda: dgamma / len(x),
    }


def _of_x(dy: Tensor, x: Tensor, gamma: Tensor, dx: Tensor) -> Variants:
    """dx of the misconceptions; its three terms are those of `batchnorm explain`."""
    _, _, variance, xhat = reference.forward(x, eps=EPS)
    std = (variance + EPS).sqrt()
    direct = dy * gamma / std
    through_variance = -xhat * (dy * gamma * xhat).mean(0) / std
    through_mean = -(dy * gamma).mean(0) / std
    return {
        why.CONSTANT_STATISTICS: lambda: direct,
        why.NO_PATH_THROUGH_VARIANCE: lambda: direct + through_mean,
        why.NO_PATH_THROUGH_MEAN: lambda: direct + through_variance,
        why.GAMMA_FORGOTTEN_IN_GRADIENT: lambda: dx / gamma,
        why.GRADIENT_NOT_SCALED: lambda: dx * std,
    }


TASK = Task(
    3,
    "backward",
    marked("the backward by hand"),
    (
        marked(
            "Write backward(dy, x, gamma, eps): dy is dL/dy of shape (N, C), and x, gamma and eps are those of the forward. Return the "
            "tuple dx (N, C), dgamma (C,), dbeta (C,). It is compared with autograd in float64; do not call autograd yourself."
        ),
    ),
    ("backward",),
    (
        marked(
            "An x changes its own output directly, and every output of its channel through the mean and through the variance."
        ),
        marked(
            "dbeta = Σ dy and dgamma = Σ dy · x̂ over the batch. With dx̂ = dy · γ, dx has three terms: see `batchnorm explain`."
        ),
        marked("dx = (dx̂ - mean(dx̂) - x̂ · mean(dx̂ · x̂)) / √(σ² + ε), with means over dim 0."),
    ),
    check,
)
