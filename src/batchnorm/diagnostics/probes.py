"""Calls of a single layer, and of a sample among others: what do they depend on?"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.diagnostics import thresholds
from batchnorm.diagnostics.norms import Norm
from batchnorm.diagnostics.record import input_of


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
