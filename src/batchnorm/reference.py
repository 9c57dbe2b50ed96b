"""The oracle: batch normalization as in the paper, in float64 and plain torch. Slow on purpose, and short enough to check by eye.

Ioffe & Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", arXiv:1502.03167.
Algorithm 1 (forward), the unnumbered equations of section 3 (backward), Algorithm 2 and section 3.1 (inference).
It shares no code with the kernels that are tested against it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Normalized(NamedTuple):
    """Output and intermediate results of Algorithm 1, float64.

    Attributes:
        y: (N, C, *S).
        mean: (C,).
        variance: (C,), biased.
        xhat: (N, C, *S).
    """

    y: Tensor
    mean: Tensor
    variance: Tensor
    xhat: Tensor


class Gradients(NamedTuple):
    """Gradients of a loss through Algorithm 1, float64: x (N, C, *S), gamma (C,), beta (C,)."""

    x: Tensor
    gamma: Tensor
    beta: Tensor


def forward(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5) -> Normalized:
    """Algorithm 1 over every axis of x (N, C, *S) except the channel axis."""
    x, gamma, beta, C = _wide(x, gamma, beta)
    m = x.numel() // C
    mean = _per_channel(x) / m
    variance = _per_channel((x - _like(mean, x)) ** 2) / m
    xhat = (x - _like(mean, x)) / torch.sqrt(_like(variance, x) + eps)
    return Normalized(_like(gamma, x) * xhat + _like(beta, x), mean, variance, xhat)


def backward(dy: Tensor, x: Tensor, gamma: Tensor | None = None, eps: float = 1e-5) -> Gradients:
    """The six equations of section 3, in their order."""
    x, gamma, _, C = _wide(x, gamma, None)
    dy = dy.double()
    m = x.numel() // C
    _, mean, variance, xhat = forward(x, gamma, None, eps)
    deviation, sigma2 = x - _like(mean, x), _like(variance, x) + eps
    dxhat = dy * _like(gamma, x)
    dvariance = _per_channel(dxhat * deviation * -0.5 * sigma2**-1.5)
    dmean = _per_channel(-dxhat / torch.sqrt(sigma2)) + dvariance * _per_channel(-2 * deviation) / m
    dx = dxhat / torch.sqrt(sigma2) + _like(dvariance, x) * 2 * deviation / m + _like(dmean, x) / m
    return Gradients(dx, _per_channel(dy * xhat), _per_channel(dy))


def inference(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Algorithm 2, line 11: y = gamma / sqrt(Var + eps) · x + (beta - gamma · E / sqrt(Var + eps))."""
    x, gamma, beta, _ = _wide(x, gamma, beta)
    xhat = (x - _like(mean.double(), x)) / torch.sqrt(_like(variance.double(), x) + eps)
    return _like(gamma, x) * xhat + _like(beta, x)


def running(
    mean: Tensor, variance: Tensor, x: Tensor, momentum: float = 0.1, *, unbiased: bool = True
) -> tuple[Tensor, Tensor]:
    """Moving averages after one more batch; momentum is the weight of the new value, and section 3.1 uses m / (m - 1) · variance."""
    m = x.numel() // x.shape[1]
    batch = forward(x)
    correction = m / (m - 1) if unbiased else 1.0
    return (
        (1 - momentum) * mean.double() + momentum * batch.mean,
        (1 - momentum) * variance.double() + momentum * correction * batch.variance,
    )


def _wide(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
    C = x.shape[1]
    x = x.double()
    return (
        x,
        x.new_ones(C) if gamma is None else gamma.double(),
        x.new_zeros(C) if beta is None else beta.double(),
        C,
    )


def _per_channel(x: Tensor) -> Tensor:
    return x.sum([axis for axis in range(x.dim()) if axis != 1])  # (N, C, *S) -> (C,)


def _like(channel_values: Tensor, x: Tensor) -> Tensor:
    return channel_values.reshape([1, -1] + [1] * (x.dim() - 2))  # (C,) -> (1, C, 1, ...)
