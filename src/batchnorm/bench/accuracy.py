"""How far a provider's result is from the exact one, on some of the channels: batch normalization keeps channels apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm import kernels, reference
from batchnorm.bench.case import DTYPES, Case, Tensors

CHANNELS = 4  # looked at, spread over all
KINKS = (-3.0, 0.0, 3.0, 6.0)  # where some activation's derivative jumps


def max_error(case: Case, given: Tensors, result: Tensor) -> float:
    """Largest |result - exact| for y, or for dx in a backward, against `reference` in float64.

    Beside a kink of the activation the exact derivative is one of two values, and rounding decides which: gradients of z within
    8 roundings of a kink are not compared.
    """
    C = case.layer.shape[1]
    chosen = torch.linspace(0, C - 1, min(CHANNELS, C)).long()
    value = (result.to_dense() if result.is_mkldnn else result).detach().index_select(1, chosen).double()
    exact, z = _exact(case, given, chosen)
    error = (value - exact).abs()
    if case.direction in ("backward", "step") and case.layer.activation is not None:
        margin = 8 * torch.finfo(DTYPES[case.dtype]).eps
        for kink in KINKS:
            error = error.masked_fill((z - kink).abs() < margin, 0.0)
    return torch.where(error.isfinite(), error, math.inf).max().item()


@torch.enable_grad()
def _exact(case: Case, given: Tensors, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The exact y or dx, and the pre-activation z, (N, chosen, *S)."""
    x, dy = (value.detach().index_select(1, chosen).double() for value in (given.x, given.dy))
    x.requires_grad_(case.direction in ("backward", "step"))
    weight, bias = given.weight[chosen], given.bias[chosen]
    if case.direction == "inference":
        z = reference.inference(x, given.mean[chosen], given.variance[chosen], weight, bias)
    else:
        z = reference.forward(x, weight, bias).y
    if given.residual is not None:
        z = z + given.residual.index_select(1, chosen).double()
    activation = kernels.parse(case.layer.activation)
    y = z if activation is None else activation(z)
    return (torch.autograd.grad(y, x, dy)[0] if x.requires_grad else y.detach()), z.detach()
