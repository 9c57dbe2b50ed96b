"""Batch renormalization (Ioffe 2017, arXiv:1702.03275, Algorithm 1): x̂ · r + d takes the place of x̂.

    r = clip(sigma / running sigma, 1 / r_max, r_max)      d = clip((mean - running mean) / running sigma, -d_max, d_max)

with sigma = sqrt(variance + eps). Both are constants in the backward. With weight w and g, the gradient of z:

    dx as of a layer with weight r · w           dw = r · Σg·x̂ + d · Σg             dbias = Σg
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.torch_state import is_exporting


class Correction(NamedTuple):
    """r and d of one batch, (C,) each, in the dtype of its moments."""

    r: Tensor
    d: Tensor

    def weight_grad(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> Tensor:
        """The gradient of the weight, from the sums that are the gradients of r · weight and d · weight + bias."""
        return self.r * sum_grad_xhat + self.d * sum_grad


class Renormalization(NamedTuple):
    """The running statistics toward which a batch is corrected, and bounds of the correction.

    Attributes:
        running_mean: (C,), before this batch updates it.
        running_var: (C,), likewise.
        r_max: 0-d, at least 1, on the same device.
        d_max: 0-d, at least 0, likewise.
    """

    running_mean: Tensor
    running_var: Tensor
    r_max: Tensor
    d_max: Tensor

    def of(self, batch: Moments, eps: float) -> Correction:
        """r and d of a batch with these moments."""
        batch, dtype = batch.detach(), batch.mean.dtype
        with torch.no_grad():
            r_max, d_max = self.r_max.to(dtype), self.d_max.to(dtype)
            running_rstd = (self.running_var.to(dtype) + eps).rsqrt()
            r = ((batch.variance() + eps).sqrt() * running_rstd).clamp(1 / r_max, r_max)
            d = ((batch.mean - self.running_mean) * running_rstd).clamp(-d_max, d_max)
            return Correction(saved(r), saved(d))

    def copy(self) -> Renormalization:
        """A copy that later updates do not change."""
        return Renormalization(*(value.clone() for value in self))


# Compiled code may compute cheap values again in its backward, when the buffers have been updated. It saves the result of an operator.
torch.library.define("batchnorm::saved", "(Tensor value) -> Tensor")
torch.library.impl("batchnorm::saved", "CompositeExplicitAutograd")(Tensor.clone)
torch.library.register_fake("batchnorm::saved")(torch.empty_like)


def saved(value: Tensor) -> Tensor:
    """A constant for the backward, computed from buffers that the same forward updates later."""
    compiling = torch.compiler.is_compiling() and not is_exporting()
    return torch.ops.batchnorm.saved.default(value) if compiling else value
