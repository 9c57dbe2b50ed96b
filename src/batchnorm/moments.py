"""Moments: count, mean, and sum of squared deviations. Bessel's correction is applied here only, except for the formula in `explain`.

Two sets of moments merge exactly (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance"):

    n    = n_a + n_b
    mean = mean_a + (mean_b - mean_a) * n_b / n
    M2   = M2_a + M2_b + (mean_b - mean_a)^2 * n_a * n_b / n

For float32 input the C++ kernels compute M2 as sum(x^2) - sum(x)^2 / n in one pass, in float64, which has 29 bits to spare. If this cancels
more than 12 of them, sum(x^2) / M2 > 4096, a second pass sums (x - mean)^2 (`csrc/sums.h`). `eager` always takes two passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import InputError

# A larger count is of several values. It is a whole number, or the sum of sample weights, which rounding may leave above 1 or below 2.
SEVERAL = 1.5


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations (M2) of each channel.

    Attributes:
        count: values per channel; an int, or a 0-d float64 tensor if it depends on a mask. With sample weights, their sum.
        mean: (C,), float64 if the device has it; complex for complex input.
        m2: (C,), the same dtype: the sum of (x - mean)^2; for complex input, of each component.
    """

    count: int | Tensor  # pyright: ignore[reportIncompatibleMethodOverride] (nobody counts items of moments)
    mean: Tensor
    m2: Tensor

    def variance(self, *, unbiased: bool = False) -> Tensor:
        """Variance of each channel, (C,): M2 / n, or M2 / (n - 1) with Bessel's correction.

        The paper normalizes with the biased variance (Algorithm 1) and infers with the unbiased one (section 3.1).
        The variance of no values is 0; the unbiased variance of one value is 0 too, where torch has NaN. Sample weights are frequencies
        here: a weight of 2 counts as the sample twice, so M2 is divided by their sum, or their sum - 1.
        """
        return self.m2 / divisor_of(self.count - 1 if unbiased else self.count)

    def has_variance(self) -> bool | Tensor:
        """Whether they are of several values; 0-d bool if only the device knows."""
        return self.count > SEVERAL

    def rstd(self, eps: float) -> Tensor:
        """1 / sqrt(biased variance + eps), (C,), the factor in the paper's Algorithm 1."""
        if self.mean.is_complex():
            return torch.view_as_complex((torch.view_as_real(self.variance()) + eps).rsqrt())
        return (self.variance() + eps).rsqrt()

    def detach(self) -> Moments:
        """The same moments, outside the autograd graph."""
        count = self.count.detach() if isinstance(self.count, Tensor) else self.count
        return Moments(count, self.mean.detach(), self.m2.detach())

    def row(self) -> Tensor:
        """(1 + 2C,): count, mean and M2 in one tensor, on their device."""
        count = self.count
        if not isinstance(count, Tensor):
            count = self.mean.new_full((), count)  # on the device, since a copy from the host could wait for it
        return torch.cat([count.to(self.mean).reshape(1), self.mean, self.m2])

    @staticmethod
    def of_row(row: Tensor) -> Moments:
        """The moments in a tensor of `row`, (1 + 2C,)."""
        C = row.shape[0] // 2
        return Moments(row[0], row[1 : C + 1], row[C + 1 :])

    @staticmethod
    def pooled_rows(rows: Tensor) -> Moments:
        """`pooled` of moments as rows, (W, 1 + 2C)."""
        C = rows.shape[1] // 2
        return Moments.pooled(rows[:, 0], rows[:, 1 : C + 1], rows[:, C + 1 :])

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of values together; exact up to rounding, in any order.

        Raises:
            InputError: if the two have different numbers of channels.
        """
        if self.mean.shape != other.mean.shape:
            raise InputError(
                f"moments merge channel by channel, but one has shape {tuple(self.mean.shape)} and the other "
                f"{tuple(other.mean.shape)}; merge moments of the same layer"
            )
        if self.mean.is_complex():
            merged = self._components().merge(other._components())
            return Moments(merged.count, torch.view_as_complex(merged.mean), torch.view_as_complex(merged.m2))
        count = self.count + other.count
        share = other.count / divisor_of(count)
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.m2 + other.m2 + delta.square() * (self.count * share))

    def pool(self) -> Moments:
        """Merge the moments of G sets with equal counts, (G, C), into one, (C,)."""
        if self.mean.is_complex():
            pooled = self._components().pool()
            return Moments(pooled.count, torch.view_as_complex(pooled.mean), torch.view_as_complex(pooled.m2))
        groups = self.mean.shape[0]
        counts = torch.as_tensor(self.count, dtype=self.mean.dtype, device=self.mean.device).expand(groups)
        return Moments(self.count * groups, *Moments.pooled(counts, self.mean, self.m2)[1:])

    @staticmethod
    def pooled(counts: Tensor, means: Tensor, m2s: Tensor) -> Moments:
        """Merge the moments of W sets of values, in their order; differentiable.

            mean = m + Σ n_i (mean_i - m) / n      with m = Σ n_i mean_i / n, whose rounding error the second sum corrects
            M2   = Σ M2_i + Σ n_i (mean_i - mean)²

        Args:
            counts: (W,), float64.
            means: (W, C); any finite values where the count is 0.
            m2s: (W, C).
        """
        count = counts.sum()
        shares = (counts / divisor_of(count)).unsqueeze(1)  # (W, 1)
        mean = (shares * means).sum(0)
        mean = mean + (shares * (means - mean)).sum(0)
        return Moments(count, mean, m2s.sum(0) + (counts.unsqueeze(1) * (means - mean).square()).sum(0))

    def _components(self) -> Moments:
        """Moments of the real and imaginary components, (C, 2)."""
        return Moments(self.count, torch.view_as_real(self.mean), torch.view_as_real(self.m2))


def divisor_of(count: int | Tensor) -> int | Tensor:
    """A count to divide by: for no values every sum is 0, so any divisor gives 0. The sum of sample weights may lie below 1."""
    return torch.where(count > 0, count, 1) if isinstance(count, Tensor) else max(count, 1)
