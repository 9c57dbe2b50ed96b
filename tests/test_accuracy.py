"""The error budget: against float64 our largest error is never above twice torch's planar error, or half an ulp of the result.

Torch's planar error is that of `F.batch_norm` on the same values, contiguous, in the same dtype. Where the input itself is float64,
the exact values come from 200-bit arithmetic.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import reference
from batchnorm.functional import normalize
from batchnorm.moments import Moments
from tests.budget import (
    assert_same_bits,
    assert_ulps,
    assert_within_budget,
    error_in_ulps,
    max_error,
    ulp,
)

EPS = 1e-5
MOMENTUM = 0.1
SHAPE = (8, 4, 6, 10)
C = SHAPE[1]


# The helpers can fail.


def test_max_error_sees_one_wrong_value():
    exact = torch.zeros(2, 3, dtype=torch.float64)
    wrong = exact.clone()
    wrong[1, 2] = -0.25
    assert max_error(exact, exact) == 0.0
    assert max_error(wrong.to(torch.bfloat16), exact) == 0.25


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_max_error_of_what_is_not_finite_is_infinite(value):
    assert max_error(torch.tensor([0.0, value]), torch.zeros(2, dtype=torch.float64)) == float("inf")


@pytest.mark.parametrize(
    ("value", "exact", "message"),
    [
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64), "compared"),
        (torch.zeros(2), torch.zeros(2), "must be float64"),
        (torch.zeros(1), torch.full((1,), float("nan"), dtype=torch.float64), "not finite"),
    ],
    ids=["shape", "narrow-oracle", "oracle-not-finite"],
)
def test_max_error_refuses_a_comparison_that_says_nothing(value, exact, message):
    with pytest.raises(AssertionError, match=message):
        max_error(value, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ulp_is_the_distance_to_the_next_number(dtype):
    info = torch.finfo(dtype)
    for magnitude in (1.0, 1.5, 1.999, 2.0, 3e-3, 1000.0, info.smallest_normal, info.smallest_normal / 2):
        value = torch.tensor(magnitude, dtype=dtype)
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        following = (value.view(integer) + 1).view(dtype)
        assert ulp(value.item(), dtype) == (following.double() - value.double()).item(), magnitude


def test_budget_is_twice_torchs_error_or_half_an_ulp():
    exact = torch.tensor([1.0], dtype=torch.float64)

    def off(error: float) -> Tensor:
        return exact.float() + error

    assert_within_budget("y", off(2e-3), off(1e-3), exact)
    with pytest.raises(AssertionError, match=r"budget 0\.002"):
        assert_within_budget("y", off(2.1e-3), off(1e-3), exact)
    one_ulp = torch.finfo(torch.float32).eps
    with pytest.raises(AssertionError, match=r"y: the error is 1\.19e-07"):
        assert_within_budget("y", off(one_ulp), off(0.0), exact)
    assert_within_budget("y", off(one_ulp), off(0.0), exact + one_ulp / 2)
    with pytest.raises(AssertionError, match=r"y is torch\.float32"):
        assert_within_budget("y", off(0.0), off(0.0).double(), exact)


def test_ulps_are_counted():
    exact = torch.tensor([1.0, 0.0], dtype=torch.float64)
    value = torch.tensor([1.0, 3 * torch.finfo(torch.float32).eps])
    assert error_in_ulps(value, exact) == 3.0
    assert error_in_ulps(value, exact, scale=2.0) == 1.5
    assert_ulps("y", value, exact, 3)
    with pytest.raises(AssertionError, match="3 ulps"):
        assert_ulps("y", value, exact, 2.9)


# Twice torch's planar error.


class Results(NamedTuple):
    """Everything one training step gives; as many as the budget covers."""

    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    running_mean: Tensor
    running_var: Tensor


class Layout(NamedTuple):
    """Another arrangement in memory of the values of a planar (N, C, H, W) tensor, and the way back."""

    of_planar: Callable[[Tensor], Tensor]
    to_planar: Callable[[Tensor], Tensor]


def same(value: Tensor) -> Tensor:
    return value


def rows(value: Tensor) -> Tensor:
    return value.movedim(1, -1).reshape(-1, C)  # (M, C)


def planes(value: Tensor) -> Tensor:
    N, _, *S = SHAPE
    return value.reshape(N, *S, C).movedim(-1, 1).contiguous()


def strided(value: Tensor) -> Tensor:
    return value.repeat_interleave(2, dim=-1)[..., ::2]


def transposed(value: Tensor) -> Tensor:
    return value.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)  # H outermost


LAYOUTS = {
    "planar": Layout(same, same),
    "channels_last": Layout(lambda value: value.contiguous(memory_format=torch.channels_last), same),
    "2d": Layout(rows, planes),
    "strided": Layout(strided, same),
    "transposed": Layout(transposed, same),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MEANS = [0.0, 1.0, 100.0, 1e4]
SCALES = [1e-6, 1e-3, 1.0, 1e3, 1e6]


class Data(NamedTuple):
    """Input and parameters of one dtype, and the gradient of the output, planar."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


@cache
def data(dtype: torch.dtype, mean: float, scale: float, parameters: torch.dtype | None = None) -> Data:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    maps = (mean + scale * random(*SHAPE), random(*SHAPE))
    channel_values = (random(C), random(C), random(C), random(C).exp())
    return Data(*(value.to(dtype) for value in maps), *(value.to(parameters or dtype) for value in channel_values))


def fits(dtype: torch.dtype, mean: float, scale: float) -> bool:
    """Whether input and running variance are finite numbers of the dtype."""
    return max(mean + 6 * scale, scale**2) < torch.finfo(dtype).max


def step(function: Callable[..., Tensor], data: Data, layout: Layout) -> Results:
    """One training step by torch's signature; results planar again."""
    x = layout.of_planar(data.x).detach().requires_grad_()
    weight, bias = (value.clone().requires_grad_() for value in (data.weight, data.bias))
    running_mean, running_var = data.running_mean.clone(), data.running_var.clone()
    y = function(x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
    y.backward(layout.of_planar(data.dy))
    return Results(
        layout.to_planar(y.detach()), layout.to_planar(x.grad), weight.grad, bias.grad, running_mean, running_var
    )


@cache
def by_torch(*case) -> Results:
    return step(F.batch_norm, data(*case), LAYOUTS["planar"])


@cache
def exact(*case) -> Results:
    """By the reference, or by the same formulas in 200 bits where float64 is what is to be judged."""
    of = data(*case)
    if of.x.dtype == torch.float64:
        return in_200_bits(of)
    gradients = reference.backward(of.dy, of.x, of.weight, EPS)
    statistics = reference.running(of.running_mean, of.running_var, of.x, MOMENTUM)
    return Results(reference.forward(of.x, of.weight, of.bias, EPS).y, *gradients, *statistics)


def in_200_bits(of: Data) -> Results:
    """Algorithm 1 and the gradient of section 3, simplified, with mpmath's numbers in arrays of objects."""
    with mpmath.workprec(200):
        wide = np.vectorize(mpmath.mpf, otypes=[object])
        x, dy = (wide(value.movedim(1, 0).flatten(1).numpy()) for value in (of.x, of.dy))  # (C, N·S)
        weight, bias, running_mean, running_var = (wide(value.numpy())[:, None] for value in of[2:])
        m = x.shape[1]
        mean = x.sum(1, keepdims=True) / m
        variance = ((x - mean) ** 2).sum(1, keepdims=True) / m
        rstd = 1 / np.vectorize(mpmath.sqrt, otypes=[object])(variance + mpmath.mpf(EPS))
        xhat = (x - mean) * rstd
        dbias, dweight = dy.sum(1, keepdims=True), (dy * xhat).sum(1, keepdims=True)
        dx = weight * rstd * (dy - dbias / m - xhat * dweight / m)
        momentum = mpmath.mpf(MOMENTUM)
        moved = [
            (1 - momentum) * running + momentum * batch
            for running, batch in ((running_mean, mean), (running_var, variance * m / (m - 1)))
        ]
        results = [
            torch.from_numpy(value.astype(np.float64)) for value in (weight * xhat + bias, dx, dweight, dbias, *moved)
        ]
    N, _, *S = SHAPE
    maps = [
        value.unflatten(1, (N, *S)).movedim(1, 0).clone() if value.shape[1] > 1 else value[:, 0] for value in results
    ]
    return Results(*maps)


def named(*case) -> str:
    dtype, mean, scale, *parameters = case
    return "-".join([str(dtype), f"mean{mean:g}", f"scale{scale:g}", *map(str, parameters)]).replace("torch.", "")


HALVES = [torch.bfloat16, torch.float16]
CASES = [case for case in product(DTYPES, MEANS, SCALES) if fits(*case)]
MIXED = [(*case, torch.float32) for case in product(HALVES, MEANS, SCALES) if fits(*case)]  # as under autocast


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", CASES + MIXED, ids=lambda case: named(*case))
def test_error_is_at_most_twice_torchs(case, layout):
    found = step(bn.functional.batch_norm, data(*case), layout)
    for name, *values in zip(Results._fields, found, by_torch(*case), exact(*case), strict=True):
        assert_within_budget(name, *values)


def test_the_budget_sees_cancellation():
    """E[x^2] - E[x]^2 in float32 is what this library is not: at mean 1e4 it has to break the budget."""
    case = (torch.float32, 1e4, 1.0)

    def cancelling(x, running_mean, running_var, weight, bias, training, momentum, eps):
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = x.square().mean((0, 2, 3), keepdim=True) - mean.square()
        return (x - mean) / (variance.clamp(min=0) + eps).sqrt() * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)

    found = step(cancelling, data(*case), LAYOUTS["planar"])
    with pytest.raises(AssertionError, match="y: the error is"):
        assert_within_budget("y", found.y, by_torch(*case).y, exact(*case).y)


# Exact inputs: no tolerance.


def exact_input(dtype: torch.dtype, shape: tuple[int, ...], odd: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Input whose sums are exact in any order, and its mean and M2 (oneDNN's benchdnn does so).

    x[i] + x[i+1] = 2 · mean, and all numbers are small multiples of 1/2; with `odd` one value, the mean itself, is left over.
    """
    N, channels, *S = shape
    count = N * torch.Size(S).numel()
    mean = torch.tensor([0.0, 1.0, -2.0, 64.0])[:channels]
    steps = 2.0 ** torch.randint(-1, 4, (channels, count // 2), generator=torch.Generator().manual_seed(0))
    deviation = torch.stack([steps, -steps], dim=-1).flatten(1)  # (C, count)
    if odd:
        deviation = torch.cat([deviation, torch.zeros(channels, 1)], dim=1)
    x = (mean[:, None] + deviation).unflatten(1, (N, *S)).movedim(1, 0)  # (N, C, *S)
    assert torch.equal(x, x.to(dtype).float()), f"{dtype} does not hold this input"
    return x.to(dtype).contiguous(), mean.double(), deviation.double().square().sum(1)


@pytest.mark.parametrize("layout", ["planar", "channels_last", "strided", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_input_gives_exact_moments_and_biased_statistics(dtype, layout):
    planar, mean, m2 = exact_input(dtype, (4, 4, 8, 2))
    x = LAYOUTS[layout].of_planar(planar)
    _, moments = bn.functional.normalize(x)
    assert moments.count == 64
    assert_same_bits("mean", moments.mean, mean)
    assert_same_bits("M2", moments.m2, m2)
    layer = bn.BatchNorm(4, momentum=0.5, running_variance="biased")
    layer(x)
    assert_same_bits("running mean", layer.running_mean, (0.5 * mean).float())
    assert_same_bits("running variance", layer.running_var, (0.5 + 0.5 * m2 / 64).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_input_gives_exact_unbiased_statistics(dtype):
    """Of 65 values: 64 is what Bessel's correction divides by."""
    x, mean, m2 = exact_input(dtype, (5, 4, 13), odd=True)
    running_mean, running_var = torch.zeros(4), torch.ones(4)
    bn.functional.batch_norm(x, running_mean, running_var, training=True, momentum=0.5)
    assert_same_bits("running mean", running_mean, (0.5 * mean).float())
    assert_same_bits("running variance", running_var, (0.5 + 0.5 * m2 / 64).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_input_under_a_mask(dtype):
    """Pairs stay together: what the mask leaves is exact as well. What it hides is NaN."""
    x, mean, _ = exact_input(dtype, (8, 4, 8))
    mask = torch.arange(8) < 4  # along S, whole pairs
    deviation = (x.double() - mean[:, None])[..., :4]
    x[..., 4:] = float("nan")
    _, moments = bn.functional.normalize(x, mask=mask)
    assert moments.count == 32
    assert_same_bits("mean", moments.mean, mean)
    assert_same_bits("M2", moments.m2, deviation.square().sum((0, 2)))


@pytest.mark.parametrize("layout", ["planar", "channels_last"])
def test_huge_input_is_normalized(layout):
    """torch's variance overflows here and its output is all zero."""
    x = LAYOUTS[layout].of_planar(1e25 * torch.randn(8, 4, 6, 10))
    layer = bn.BatchNorm2d(4)
    x.requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = reference.forward(x)
    assert_ulps("y", y, exact.y.detach(), 1)
    assert_ulps("dx", x.grad, reference.backward(dy, x).x.detach(), 1)
    # The variance is no float32: the batch is passed over, not half of it.
    assert_same_bits("running mean", layer.running_mean, torch.zeros(4))
    assert_same_bits("running variance", layer.running_var, torch.ones(4))
    assert layer.num_nonfinite_batches == 1


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("shape", [(2, 3), (3, 3, 7), (5, 3, 7, 11)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels_give_exactly_the_bias(dtype, shape, affine):
    constants = torch.tensor([0.1, -1e4 / 3, 3e-5], dtype=dtype)
    layer = bn.BatchNorm(3, affine=affine, dtype=dtype)
    if affine:
        layer.weight.data.uniform_(-1e3, 1e3)
        layer.bias.data.uniform_(-1, 1)
    along_channels = (1, 3, *[1] * (len(shape) - 2))
    x = constants.view(along_channels).expand(shape).contiguous()
    bias = layer.bias.detach() if affine else torch.zeros(3, dtype=dtype)
    assert_same_bits("y", layer(x).detach(), bias.view(along_channels).expand(shape))


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1e20), (torch.bfloat16, 1e36), (torch.float32, 1e30)])
def test_deviations_beyond_what_float32_squares_are_normalized(dtype, scale, layout):
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 8, 9) * scale).to(dtype)
    dy = torch.randn(6, 5, 8, 9).to(dtype)
    if layout == "interleaved":
        x, dy = (value.contiguous(memory_format=torch.channels_last) for value in (x, dy))
    x.requires_grad_()
    weight = torch.ones(5, requires_grad=True)
    y, moments = normalize(x, weight, None, 1e-5)
    y.backward(dy)
    wide = x.detach().double().requires_grad_()
    exact_weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    exact, exact_moments = normalize(wide, exact_weight, None, 1e-5)
    exact.backward(dy.double())
    torch.testing.assert_close(moments.mean, exact_moments.mean, rtol=1e-6, atol=scale * 1e-6)
    torch.testing.assert_close(moments.m2, exact_moments.m2, rtol=1e-6, atol=0)
    assert_ulps("y", y, exact.detach(), 1.5)
    assert_ulps("dweight", weight.grad, exact_weight.grad, 4)
    assert x.grad.isfinite().all()


def test_dweight_of_float32_parameters_is_as_good_under_half_input():
    for seed in range(60):
        numbers = torch.Generator().manual_seed(seed)
        shape = (1 + seed % 6, 2, 16, 105)
        x = (torch.randn(shape, generator=numbers) * 0.001 + 1000).bfloat16()
        dy = torch.randn(shape, generator=numbers).bfloat16()
        mean, variance = torch.full((2,), 0.5), torch.full((2,), 0.7)

        def dweight(function, *tensors):
            x, dy, mean, variance = tensors
            weight = torch.ones(2, dtype=mean.dtype, requires_grad=True)
            return torch.autograd.grad(function(x, mean, variance, weight, None, False, 0.1, 1e-3), weight, dy)[0]

        exact = dweight(torch.nn.functional.batch_norm, *(value.double() for value in (x, dy, mean, variance)))
        ours = dweight(bn.functional.batch_norm, x, dy, mean, variance)
        torchs = dweight(torch.nn.functional.batch_norm, x, dy, mean, variance)
        assert_within_budget("dweight", ours, torchs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_far_below_zero_an_activation_is_zero(dtype, activation):
    x = torch.tensor([-1e4, -3e4, -800.0, -95.0, -50.0, 50.0]).to(dtype).view(1, 1, 6).requires_grad_()
    y = bn.functional.batch_norm(x, torch.zeros(1), torch.ones(1), None, None, False, 0.1, 0.0, activation=activation)
    y.backward(torch.ones_like(y))
    assert (y[0, 0, :3] == 0).all()
    assert (x.grad[0, 0, :3] == 0).all()
    assert x.grad[0, 0, 5] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("by", ["mask", "groups", "replicas"])
def test_one_value_is_its_own_mean_and_has_no_gradient(dtype, by):
    torch.manual_seed(0)
    x = {"mask": torch.randn(4, 3, 5), "groups": torch.randn(4, 3), "replicas": torch.randn(1, 3)}[by].to(dtype)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = True
    options = {"mask": {"mask": mask}, "groups": {"group_size": 1}, "replicas": {"reducer": OneOfTwo()}}[by]
    x.requires_grad_()
    y, _ = normalize(x, None, torch.ones(3, dtype=dtype), 1e-5, activation="relu", **options)
    y.backward(torch.randn_like(y))
    assert (x.grad == 0).all()
    assert (y == (mask.unsqueeze(1) if by == "mask" else 1)).all()


class OneOfTwo:
    """Of two replicas, the one that has all the values there are."""

    size = 2

    def merge(self, moments):
        return Moments(torch.tensor(float(moments.count), dtype=torch.float64), moments.mean, moments.m2)

    def sum(self, sum_grad, sum_grad_xhat):
        return sum_grad, sum_grad_xhat
