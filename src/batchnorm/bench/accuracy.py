"""Errors of a provider's result against the exact one, on a sample of the channels, which are independent of each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm import kernels, reference
from batchnorm.bench.case import DTYPES, Case, Tensors

CHANNELS = 4  # size of the sample
KINKS = (-3.0, 0.0, 3.0, 6.0)  # discontinuities of the derivatives of activations


class Exact:
    """The exact y, or dx of a backward, computed by `reference` in float64.

    At a kink of the activation, rounding decides which of two derivatives is used. So gradients are not compared where z is within
    8 units of rounding of a kink.
    """

    def __init__(self, case: Case, given: Tensors) -> None:
        C = case.layer.shape[1]
        self._channels = slice(0, None, -(-C // CHANNELS))
        self._value, z = self._compute(case, given)
        self._undecided: Tensor | None = None
        if case.direction in ("backward", "step") and case.layer.activation is not None:
            margin = 8 * torch.finfo(DTYPES[case.dtype]).eps
            near = [(z - kink).abs() < margin for kink in KINKS]
            self._undecided = torch.stack(near).any(0)

    def error(self, result: Tensor) -> float:
        """Largest |result - exact|; infinite if a value is not finite."""
        dense = result.to_dense() if result.is_mkldnn else result
        error = (dense.detach()[:, self._channels].double() - self._value).abs()
        if self._undecided is not None:
            error = error.masked_fill(self._undecided, 0.0)
        return torch.where(error.isfinite(), error, math.inf).max().item()

    @torch.enable_grad()
    def _compute(self, case: Case, given: Tensors) -> tuple[Tensor, Tensor]:
        """The exact value and the pre-activation z of the sampled channels, (N, sampled C, *S)."""
        x, dy = (value.detach()[:, self._channels].double() for value in (given.x, given.dy))
        weight, bias, mean, variance = (
            value[self._channels] for value in (given.weight, given.bias, given.mean, given.variance)
        )
        x.requires_grad_(case.direction in ("backward", "step"))
        inference = case.direction == "inference"
        z = reference.inference(x, mean, variance, weight, bias) if inference else reference.forward(x, weight, bias).y
        if given.residual is not None:
            z = z + given.residual[:, self._channels].double()
        activation = kernels.parse(case.layer.activation)
        y = z if activation is None else activation(z)
        return (torch.autograd.grad(y, x, dy)[0] if x.requires_grad else y.detach()), z.detach()
