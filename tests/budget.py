"""Error budgets: how far a result may lie from the exact one, in units that follow from its dtype.

A result that is computed wide and rounded once is off by half a unit in the last place (ulp) of itself, so by at most half an ulp of
the largest result. torch's own error in the same dtype is the measure beside it (flash-attention's rule: at most twice torch's), and
the half ulp is what remains of the budget where torch happens to hit the exact value: no rounded result can promise less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_ULP = 0.501  # a thousandth more than a half: what float64 may add before the one rounding, generously


def max_error(value: Tensor, exact: Tensor) -> float:
    """Largest |value - exact|; infinite where a value is not finite and the exact one is. Shapes must agree."""
    assert value.shape == exact.shape, f"compared {tuple(value.shape)} with {tuple(exact.shape)}"
    assert exact.dtype == torch.float64, f"the exact values must be float64, but are {exact.dtype}"
    assert exact.isfinite().all(), "the exact values are not finite: the case is outside of what the budget covers"
    if value.numel() == 0:
        return 0.0
    error = (value.detach().double() - exact.detach()).abs()
    return torch.where(error.isfinite(), error, math.inf).max().item()


def largest(value: Tensor) -> float:
    """Largest |value|; 0 of no values."""
    return value.detach().double().abs().max().item() if value.numel() else 0.0


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighboring numbers of a dtype at a magnitude."""
    info = torch.finfo(dtype)
    smallest_exponent = math.frexp(info.smallest_normal)[1]
    exponent = max(math.frexp(magnitude)[1], smallest_exponent)  # magnitude = m · 2**exponent, 1/2 <= m < 1
    return math.ldexp(info.eps, exponent - 1)


def error_in_ulps(value: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """The largest error in ulps of `scale`, or of the largest exact value.

    A scale of its own is for results in which larger terms cancel: their rounding errors are those of the terms.
    """
    return max_error(value, exact) / ulp(max(largest(exact), scale or 0.0), value.dtype)


def assert_ulps(what: str, value: Tensor, exact: Tensor, ulps: float, scale: float | None = None) -> None:
    """The largest error is at most so many ulps."""
    found = error_in_ulps(value, exact, scale)
    assert found <= ulps, f"{what}: the error is {found:.3g} ulps of {value.dtype}, the budget {ulps}"


def assert_within_budget(what: str, value: Tensor, torchs: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The largest error is at most `factor` times torch's in the same dtype, or half an ulp where torch's is less than that."""
    assert value.dtype == torchs.dtype, f"{what} is {value.dtype}, torch's {torchs.dtype}"
    error, torch_error = max_error(value, exact), max_error(torchs, exact)
    budget = max(factor * torch_error, HALF_ULP * ulp(largest(exact), value.dtype))
    assert error <= budget, (
        f"{what}: the error is {error:.3g}, the budget {budget:.3g} (torch's error {torch_error:.3g})"
    )


def assert_same_bits(what: str, value: Tensor, expected: Tensor) -> None:
    """Equal in shape, dtype and every value; NaN equals NaN."""
    torch.testing.assert_close(
        value, expected, rtol=0, atol=0, equal_nan=True, msg=lambda message: f"{what}: {message}"
    )
