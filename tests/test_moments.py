"""Moments merge to the moments of the whole, and know what of no value and of one value can be known."""

import pytest
import torch

from batchnorm import Moments
from batchnorm.errors import InputError
from batchnorm.functional import normalize


def moments_of(x: torch.Tensor) -> Moments:
    """Of x (M, C)."""
    if len(x) == 0:
        return Moments(0, x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1]))
    return Moments(len(x), x.mean(0), (x - x.mean(0)).square().sum(0))


@pytest.mark.parametrize("split", [0, 1, 5, 19, 20])
def test_merging_two_parts_gives_the_whole(split):
    x = torch.randn(20, 3, dtype=torch.float64) * 2 + 1e4
    merged = moments_of(x[:split]).merge(moments_of(x[split:]))
    torch.testing.assert_close(tuple(merged), tuple(moments_of(x)), rtol=1e-12, atol=0)


def test_merging_is_exact_where_the_numbers_are():
    one, other = (
        Moments(2, torch.tensor([1.0]), torch.tensor([2.0])),
        Moments(2, torch.tensor([3.0]), torch.tensor([2.0])),
    )
    assert one.merge(other) == (4, torch.tensor([2.0]), torch.tensor([8.0]))


def test_between_part_variance_is_counted():
    """What an average of variances misses: parts that do not vary, around means that do."""
    merged = Moments(5, torch.tensor([-1.0]), torch.tensor([0.0])).merge(
        Moments(5, torch.tensor([1.0]), torch.tensor([0.0]))
    )
    assert merged.variance() == 1.0


def test_counts_may_be_tensors():
    x = torch.randn(20, 3, dtype=torch.float64)
    one, other = moments_of(x[:8]), moments_of(x[8:])
    merged = one._replace(count=torch.tensor(8.0).double()).merge(other._replace(count=torch.tensor(12.0).double()))
    torch.testing.assert_close(merged.variance(unbiased=True), x.var(0), rtol=1e-12, atol=0)


def test_bessel():
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(moments_of(x).variance(), x.var(0, unbiased=False))
    torch.testing.assert_close(moments_of(x).variance(unbiased=True), x.var(0))


@pytest.mark.parametrize("count", [0, 1, torch.tensor(0.0), torch.tensor(1.0)], ids=str)
def test_few_values_have_variance_zero(count):
    few = Moments(count, torch.zeros(2), torch.zeros(2))
    assert torch.equal(few.variance(), torch.zeros(2))
    assert torch.equal(few.variance(unbiased=True), torch.zeros(2))


def test_other_channels_do_not_merge():
    with pytest.raises(InputError, match=r"channel by channel.*\(2,\).*\(3,\)"):
        Moments(1, torch.zeros(2), torch.zeros(2)).merge(Moments(1, torch.zeros(3), torch.zeros(3)))


def test_complex_moments_merge_part_by_part():
    x = torch.randn(20, 3, dtype=torch.complex128)
    whole, one, other = (normalize(part)[1] for part in (x, x[:7], x[7:]))
    torch.testing.assert_close(tuple(one.merge(other)), tuple(whole))
    parts = torch.view_as_real(x).var(0, unbiased=False)
    torch.testing.assert_close(torch.view_as_real(whole.rstd(1e-3)), (parts + 1e-3).rsqrt())
    torch.testing.assert_close(normalize(x.conj())[1].mean, whole.mean.conj().resolve_conj())


def test_pooled_moments_are_those_of_everything():
    x = torch.randn(4, 6, 3, dtype=torch.float64) * 2 + 1e4
    parts = Moments(6, x.mean(1), (x - x.mean(1, keepdim=True)).square().sum(1))
    pooled, everything = parts.pool(), x.flatten(0, 1)
    assert pooled.count == 24
    torch.testing.assert_close(pooled.mean, everything.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(pooled.m2, everything.var(0, unbiased=False) * 24, rtol=1e-9, atol=0)
