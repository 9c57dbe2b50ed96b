"""How far a provider's result is from the exact one, on some of the channels: batch normalization keeps channels apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm import kernels, reference
from batchnorm.bench.case import DTYPES, Case, Tensors

CHANNELS = 4  # looked at, spread over all
KINKS = (-3.0, 0.0, 3.0, 6.0)  # where some activation's derivative jumps


class Exact:
    """The exact y, or dx of a backward, by `reference` in float64.

    Beside a kink of the activation the exact derivative is one of two values, and rounding decides which: gradients of z within
    8 roundings of a kink are not compared.
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
        """The value, and the pre-activation z; (N, some of C, *S)."""
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
