"""The C++ kernels against plain torch: every verb, layout, dtype and epilogue; any shape, any number of threads."""

import math
import os
import sys
import threading
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.kernels import Activation, Epilogue, Normalized, cpu, eager
from batchnorm.kernels.activation import ROWS
from batchnorm.moments import Moments
from tests.budget import assert_same_bits, assert_within_budget

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

ACTIVATIONS = [None, *map(Activation, ROWS)]
DTYPES = list(cpu.DTYPES)
SHAPES = {
    "planes of 35": (4, 3, 5, 7),
    "planes of 49": (8, 16, 7, 7),
    "rows of 50": (3, 5, 50),
    "two axes": (37, 67),
    "one channel": (3, 1, 50),
    "planes of one": (9, 5, 1, 1),
    "volumes": (2, 3, 2, 3, 5),
}
LAYOUTS = ["planar", "interleaved"]


def arranged(x: Tensor, layout: str) -> Tensor:
    """The same values as (N, C, *S) or as (N, *S, C) in memory."""
    return x.contiguous() if layout == "planar" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def tensors(shape, dtype, layout="planar", seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """x with mean 3 and deviation 2, dy and residual."""
    numbers = torch.Generator().manual_seed(seed)
    x, dy, residual = (torch.randn(shape, generator=numbers, dtype=torch.float64) for _ in range(3))
    return tuple(arranged(t.to(dtype), layout) for t in (2 * x + 3, dy, residual))


def epilogue(shape, residual=None, masked=False, activation=None, affine=torch.float32) -> Epilogue:
    numbers = torch.Generator().manual_seed(1)
    N, C, *S = shape
    weight, bias = (torch.rand(C, generator=numbers) + 0.5).to(affine), torch.randn(C, generator=numbers).to(affine)
    mask = torch.rand((N, 1, *S), generator=numbers) > 0.3 if masked else None
    return Epilogue(weight, bias, residual, mask, activation)


def close(what: str, found: Tensor | None, expected: Tensor | None, scale: float = 8.0, terms: float = 0.0) -> None:
    """Equal but for rounding: a few ulps of the largest value, or of the largest term that cancels in it."""
    if expected is None:
        assert found is None, what
        return
    assert found is not None
    assert found.dtype == expected.dtype, what
    assert found.shape == expected.shape, what
    largest = max(terms, expected.abs().max().double().item()) if expected.numel() else 0.0
    error = (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= scale * torch.finfo(expected.dtype).eps * largest, f"{what}: {error} of {largest}"


def away_from_kinks(z: Tensor) -> bool:
    """Whether rounding cannot decide which side of a kink a value is on."""
    return all(((z - kink).abs() > 1e-3).all() for kink in (0.0, 6.0, 3.0, -3.0))


def compare(x: Tensor, dy: Tensor, e: Epilogue) -> None:
    """All verbs of both kernels."""
    assert cpu.refuses(x, e) is None
    y, batch, rstd, *_ = cpu.forward(x, 1e-5, e)
    exact_y, exact_batch, exact_rstd, *_ = eager.forward(x, 1e-5, e)
    half = x.dtype in (torch.float16, torch.bfloat16)
    slack = 8.0 if not half else 2.0
    assert y.stride() == x.stride()
    # In float64 both kernels round: what is left of x - mean is off by an ulp of x, whatever it is multiplied by.
    terms = (x.abs().max() * exact_rstd.max()).item() if x.dtype == torch.float64 else 0.0
    close("y", y, exact_y, slack, terms)
    single = 2.0**31  # sums of half precision are float32 over eight values
    close("mean", batch.mean, exact_batch.mean, single if half else 16)
    close("m2", batch.m2, exact_batch.m2, single if half else 4096)
    close("rstd", rstd, exact_rstd, single if half else 4096)
    assert torch.as_tensor(batch.count).equal(torch.as_tensor(exact_batch.count))
    close("moments", cpu.moments(x, e.mask).m2, exact_batch.m2, single if half else 4096)
    close("normalize", cpu.normalize(x, exact_batch.mean, exact_rstd, e), exact_y, slack, terms)
    z = eager.normalize(x.double(), exact_batch.mean, exact_rstd, e._replace(activation=None, mask=None))
    if e.activation is not None and not away_from_kinks(z):
        return
    statistics = (exact_batch.mean, exact_rstd)
    sums = cpu.reduce_grad(dy, x, *statistics, e)
    exact_sums = eager.reduce_grad(dy, x, *statistics, e)
    slack_of_sums = 1e3 if x.dtype == torch.float64 else single  # the activation's derivative is float32
    for name, found, expected in zip(("sum", "sum xhat"), sums, exact_sums, strict=True):
        scale = (
            exact_sums[0].abs().max() + exact_sums[1].abs().max() + dy.double().abs().sum((0, *range(2, x.dim()))).max()
        )
        assert (found - expected).abs().max() <= slack_of_sums * 2.0**-52 * scale, name
    largest = (dy.double().abs().max() * exact_rstd.max()).item() * (1 + terms)
    mean_grads = tuple(value / x.numel() * x.shape[1] for value in exact_sums)
    for grads in (None, mean_grads):
        found, expected = cpu.input_grad(dy, x, *statistics, e, grads), eager.input_grad(dy, x, *statistics, e, grads)
        close("input_grad: dx", found[0], expected[0], slack, largest)
        close("input_grad: dresidual", found[1], expected[1], slack)
    for count in (None, batch.count):
        found, expected = (kernel.backward(dy, x, Normalized(*statistics, count), e) for kernel in (cpu, eager))
        close("backward: dx", found.input, expected.input, slack, largest)
        close("backward: dresidual", found.residual, expected.residual, slack)
    without = cpu.backward(dy, x, Normalized(*statistics, batch.count), e, needs_input_grad=False)
    assert without.input is None
    assert_same_bits("sum", without.sum_grad, found.sum_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_verbs(dtype, shape, layout):
    x, dy, residual = tensors(shape, dtype, layout)
    for activation, with_residual, masked in product(ACTIVATIONS, (False, True), (False, True)):
        compare(x, dy, epilogue(shape, residual if with_residual else None, masked, activation))


@pytest.mark.parametrize("affine", [torch.float16, torch.bfloat16, None], ids=str)
def test_affine_of_any_dtype(affine):
    shape = (4, 6, 5)
    x, dy, _ = tensors(shape, torch.float32)
    e = Epilogue() if affine is None else epilogue(shape, affine=affine)
    compare(x, dy, e)
    if affine is not None:
        strided = torch.stack([e.weight, e.weight], 1)[:, 0]
        assert_same_bits("y", cpu.forward(x, 1e-5, e._replace(weight=strided))[0], cpu.forward(x, 1e-5, e)[0])


def test_affine_wider_than_the_input_is_left_to_plain_torch():
    x, _, _ = tensors((4, 6, 5), torch.float32)
    assert "float64" in (cpu.refuses(x, epilogue((4, 6, 5), affine=torch.float64)) or "")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a is not None and a.derivative_from_output], ids=str)
def test_derivative_read_off_the_output(activation, layout):
    shape = (6, 5, 7)
    x, dy, residual = tensors(shape, torch.float32, layout)
    e = epilogue(shape, residual, activation=activation)
    y, batch, rstd, *_ = cpu.forward(x, 1e-5, e)
    by_output = e._replace(residual=None, output=y)
    for kernel in (cpu, eager):
        found = kernel.backward(dy, x, Normalized(batch.mean, rstd, batch.count), by_output)
        expected = kernel.backward(dy, x, Normalized(batch.mean, rstd, batch.count), e)
        for values in zip(found, expected, strict=True):
            assert_same_bits(kernel.name, *values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("relu", "relu6", "leaky_relu")])
def test_activation_error(name, dtype):
    """x̂ = x: the kernel's own error, at most four times that of one rounding."""
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64).to(dtype).view(-1, 1)
    activation = Activation(name)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y = cpu.normalize(z, zero, one, Epilogue(activation=activation))
    slope, _ = cpu.input_grad(torch.ones_like(z), z, zero, one, Epilogue(activation=activation), None)
    for found, expected in ((y, activation(z.double())), (slope, activation.derivative(z.double()))):
        error = (found.double() - expected).abs()
        ulps = 32 if dtype == torch.float64 else 3  # the formula it is compared with rounds as well
        assert (error <= ulps * torch.finfo(dtype).eps * expected.abs().clamp(min=0.5)).all(), error.max()


@settings(max_examples=60, deadline=None)
@given(
    N=st.sampled_from([1, 2, 3, 17, 64]),
    C=st.sampled_from([1, 2, 3, 13, 16, 64, 65, 131]),
    S=st.sampled_from([(), (1,), (2,), (13,), (3, 5), (16,), (7, 7), (1, 101), (14, 14), (2, 3, 4)]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(ACTIVATIONS),
    with_residual=st.booleans(),
    masked=st.booleans(),
)
def test_any_shape(N, C, S, dtype, layout, activation, with_residual, masked):
    torch.set_num_threads(2)
    x, dy, residual = tensors((N, C, *S), dtype, layout)
    compare(x, dy, epilogue((N, C, *S), residual if with_residual else None, masked, activation))


LARGE = {
    "planes of 49": (32, 96, 7, 7),
    "few channels": (4, 2, 200, 201),
    "one channel": (3, 1, 300, 301),
    "one long row": (1, 3, 200_003),
    "many samples": (70_000, 3, 2),
    "two axes": (4001, 33),
    "wide planes": (2, 5, 129, 128),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_same_bits_for_any_number_of_threads(shape, dtype, layout):
    x, dy, residual = tensors(shape, dtype, layout)
    e = epilogue(shape, residual, activation=Activation("relu"))

    def everything(threads):
        torch.set_num_threads(threads)
        y, batch, rstd, *_ = cpu.forward(x, 1e-5, e)
        grads = cpu.backward(dy, x, Normalized(batch.mean, rstd, batch.count), e)
        parts = cpu.moments(x, None), cpu.reduce_grad(dy, x, batch.mean, rstd, e)
        return [y, batch.mean, batch.m2, *grads, parts[0].mean, parts[0].m2, *parts[1]]

    alone = everything(1)
    for threads in (2, 3):
        for values in zip(everything(threads), alone, strict=True):
            assert_same_bits(f"{threads} threads", *values)


ABOVE_8_MB = [(8, 193, 53, 53), (64, 1500, 7, 7), (32, 700, 14, 14), (9000, 513)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_written_around_the_cache(dtype, layout):
    """Above 8 MB, with rows that end inside a cache line: every shape in both dtypes and both layouts, in two of the four pairs."""
    torch.set_num_threads(2)
    for shape in ABOVE_8_MB[(dtype is torch.bfloat16) ^ (layout == LAYOUTS[1]) :: 2]:
        x, dy, residual = tensors(shape, dtype, layout)
        e = epilogue(shape, residual, activation=Activation("relu"))
        y, batch, rstd, *_ = cpu.forward(x, 1e-5, e)
        assert_same_bits("y", cpu.normalize(x, batch.mean, rstd, e), y)
        expected = F.batch_norm(x.double(), None, None, e.weight.double(), e.bias.double(), True) + residual.double()
        close("y", y, expected.relu().to(dtype), 4)
        e = e._replace(residual=None, output=y)
        grads = cpu.backward(dy, x, Normalized(batch.mean, rstd, batch.count), e)
        parts = cpu.input_grad(dy, x, batch.mean, rstd, e, tuple(s / batch.count for s in grads[2:]))
        for values in zip(grads[:2], parts, strict=True):
            assert_same_bits("grads", *values)
        assert_same_bits("dresidual", grads.residual, torch.where(y > 0, dy, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_moments(layout, dtype):
    """x[i] + x[i+1] = 2 · mean with small multiples of 1/2: nothing is rounded, in any order."""
    for shape in [(64, 4, 7, 7), (2, 4, 64, 65), (1000, 4)]:
        count = torch.Size(shape).numel() // 4
        mean = torch.tensor([0.0, 1.0, -2.0, 64.0])
        steps = 2.0 ** torch.randint(-1, 4, (4, count // 2))
        deviation = torch.stack([steps, -steps], dim=-1).flatten(1)
        x = arranged((mean[:, None] + deviation).unflatten(1, (shape[0], *shape[2:])).movedim(1, 0).to(dtype), layout)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = cpu.moments(x, None)
            assert_same_bits("mean", found.mean, mean.double())
            assert_same_bits("m2", found.m2, deviation.double().square().sum(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_channels_give_exactly_the_bias(layout):
    values = torch.tensor([0.1, -1e4, 3e38, 0.0, 1e-30])
    x = arranged(values[None, :, None].expand(6, 5, 7).contiguous(), layout)
    bias = torch.randn(5)
    y, batch, *_ = cpu.forward(x, 1e-5, Epilogue(torch.rand(5), bias))
    assert_same_bits("mean", batch.mean, values.double())
    assert_same_bits("m2", batch.m2, torch.zeros(5, dtype=torch.float64))
    assert_same_bits("y", y, bias[None, :, None].expand(6, 5, 7))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("misled", [False, True], ids=["far from zero", "first values are no guide to the rest"])
def test_a_shift_far_from_the_mean(misled, dtype, layout):
    x = 1e6 + torch.randn(2, 3, 4001, dtype=torch.float64)
    if misled:
        x[0, :, :1] = x[0, :, 1000:1001] = x[0, :, 2000:2001] = x[0, :, 3000:3001] = -1e6
    x = arranged(x.to(dtype), layout)
    found, exact = cpu.moments(x, None), eager.moments(x.double(), None)
    torch.testing.assert_close(found.m2, exact.m2, rtol=1e-11, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_huge_and_tiny_input(layout):
    for scale in (1e25, 1e-25):
        x, dy, _ = tensors((16, 5, 13), torch.float64, layout)
        e = epilogue((16, 5, 13))
        single = (x * scale).float()
        y, batch, rstd, *_ = cpu.forward(single, 1e-60, e)
        exact = eager.forward(single.double(), 1e-60, e)
        torch.testing.assert_close(y.double(), exact[0], rtol=0, atol=2e-6)
        dx = cpu.backward(dy.float(), single, Normalized(batch.mean, rstd, batch.count), e).input
        expected = eager.backward(
            dy.float().double(), single.double(), Normalized(exact[1].mean, exact[2], batch.count), e
        ).input
        torch.testing.assert_close(dx.double() * scale, expected * scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_channel(bad, layout):
    x, _, _ = tensors((8, 3, 40), torch.float32, layout)
    x[3, 1, 5] = bad
    y, batch, *_ = cpu.forward(x, 1e-5, Epilogue(activation=Activation("relu")))
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()
    assert batch.mean.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_may_hold_anything(layout):
    shape = (6, 5, 9)
    x, dy, residual = tensors(shape, torch.float32, layout)
    e = epilogue(shape, residual, masked=True, activation=Activation("silu"))
    expected = cpu.forward(x, 1e-5, e)[0]
    for tensor in (x, residual):
        tensor.masked_fill_(~e.mask, torch.nan)
    y, batch, rstd, *_ = cpu.forward(x, 1e-5, e)
    assert_same_bits("y", y, expected)
    grads = cpu.backward(dy, x, Normalized(batch.mean, rstd, batch.count), e)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads.input.masked_select(~e.mask) == 0).all()
    nothing = e._replace(mask=torch.zeros_like(e.mask))
    assert (cpu.forward(x, 1e-5, nothing)[0] == 0).all()


def test_unaligned_and_strided_input():
    x, dy, _ = tensors((4, 6, 35), torch.float32)
    e = epilogue((4, 6, 35), activation=Activation("relu"))
    y, batch, rstd, *_ = cpu.forward(x, 1e-5, e)
    for offset in (1, 3):
        shifted = torch.empty(x.numel() + offset)[offset:].view_as(x).copy_(x)
        assert_same_bits("y", cpu.forward(shifted, 1e-5, e)[0], y)
    grads = cpu.backward(dy, x, Normalized(batch.mean, rstd, batch.count), e)
    for other in (arranged(dy, "interleaved"), torch.stack([dy, dy], -1)[..., 0]):
        assert_same_bits("dx", cpu.backward(other, x, Normalized(batch.mean, rstd, batch.count), e).input, grads.input)
    expanded = torch.ones(()).expand(x.shape)
    found = cpu.backward(expanded, x, Normalized(batch.mean, rstd, batch.count), e)
    assert_same_bits(
        "dx", found.input, cpu.backward(torch.ones_like(x), x, Normalized(batch.mean, rstd, batch.count), e).input
    )
    assert cpu.refuses(x[:, :, ::2], e) is not None
    assert cpu.refuses(x.to(torch.complex64), e) is not None
    assert cpu.refuses(x, e._replace(residual=x.double())) is not None
    assert cpu.refuses(x.to("meta"), e) is not None


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 4), (4, 3, 0)])
def test_nothing(shape):
    x = torch.empty(shape)
    e = Epilogue(activation=Activation("relu"))
    y, batch, rstd, *_ = cpu.forward(x, 1e-5, e)
    assert y.shape == x.shape
    assert batch.count == eager.forward(x, 1e-5, e)[1].count
    assert (batch.mean == 0).all()
    grads = cpu.backward(x, x, Normalized(batch.mean, rstd, batch.count), e)
    assert (grads.sum_grad == 0).all()


def test_derivatives():
    """Through the one autograd node, to the second order."""
    for layout, activation, masked in product(LAYOUTS, (None, "relu", "silu"), (False, True)):
        # Small, for the cost goes with the square: every element's derivative by every other is checked all the same.
        x, _, residual = (t.requires_grad_() for t in tensors((3, 2, 3), torch.float64, layout))
        weight, bias = (
            torch.rand(2, dtype=torch.float64).requires_grad_(),
            torch.randn(2, dtype=torch.float64).requires_grad_(),
        )
        mask = torch.rand(3, 3) > 0.3 if masked else None

        def layer(x, residual, weight, bias, mask=mask, activation=activation):
            return bn.functional.normalize(x, weight, bias, 1e-3, activation=activation, residual=residual, mask=mask)[
                0
            ]

        assert torch.autograd.gradcheck(layer, (x, residual, weight, bias))
        assert torch.autograd.gradgradcheck(layer, (x, residual, weight, bias))


def test_the_residual_is_not_kept():
    x, _, residual = (t.requires_grad_() for t in tensors((4, 3, 5), torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = bn.functional.normalize(x, activation="relu", residual=residual)
    assert residual.data_ptr() not in {tensor.data_ptr() for tensor in kept}
    assert y.data_ptr() in {tensor.data_ptr() for tensor in kept}


RUNNING = list(product((torch.float32, torch.float64), (True, False), (True, False), (None, 1.0, 0.0, 37.0)))


@pytest.mark.parametrize(("dtype", "unbiased", "skip", "masked_count"), RUNNING, ids=str)
def test_running_statistics(dtype, unbiased, skip, masked_count, monkeypatch):
    C = 5
    count = 40 if masked_count is None else torch.tensor(masked_count, dtype=torch.float64)
    for poison in (None, torch.nan, 1e300):
        mean, m2 = torch.randn(C, dtype=torch.float64), torch.rand(C, dtype=torch.float64) * 40
        if poison is not None:
            mean[2] = poison
        buffers = [torch.randn(C, dtype=dtype), torch.rand(C, dtype=dtype)]
        plain = [buffer.clone() for buffer in buffers]
        calls: list[tuple] = []

        def counted(*arguments, run=cpu.update_running, calls=calls):
            calls.append(arguments)
            return run(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(cpu, "update_running", counted)
            found = bn.functional.update_running_statistics(
                *buffers, Moments(count, mean, m2), 0.1, unbiased=unbiased, skip_nonfinite=skip
            )
            patch.setattr(cpu, "takes_update", lambda *_: False)
            expected = bn.functional.update_running_statistics(
                *plain, Moments(count, mean, m2), 0.1, unbiased=unbiased, skip_nonfinite=skip
            )
        assert len(calls) == 1
        assert (found is None) == (expected is None)
        assert found is None or found.equal(expected)
        for values in zip(buffers, plain, strict=True):
            torch.testing.assert_close(*values, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [F.silu, F.gelu], ids=["silu", "gelu"])
def test_activations_where_their_exponentials_end(activation, dtype):
    """Around the numbers at which e^x is clamped, and where z times a clamped value would grow again."""
    ends = [0.0, 1e-30, 12.9, 13.0, 13.1, 86.5, 86.7, 88.5, 1e10, 1e30, 3e38, math.inf]
    few = torch.tensor([*ends, *(-end for end in ends), math.nan])
    z = few.repeat(200).to(dtype)  # few values alone would be computed in float64
    layer = bn.BatchNorm1d(1, activation=activation.__name__).eval()
    layer.eps = 0.0
    x, exact_x = z[:, None].clone().requires_grad_(), z[:, None].double().requires_grad_()
    y, exact = layer(x), activation(exact_x)
    dx, exact_dx = (torch.autograd.grad(value.sum(), given)[0] for value, given in ((y, x), (exact, exact_x)))
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-7, "equal_nan": True}
    torch.testing.assert_close(y.double(), exact, **tolerance)
    torch.testing.assert_close(dx.double(), exact_dx, **tolerance)


def operator_calls():
    x, dy, residual = tensors((4, 3, 5), torch.float32)
    mean, rstd = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    e = (torch.rand(3), None, residual, None, 1, 0.0)
    weights = torch.rand(4, 1, 5, dtype=torch.float64)
    ops = torch.ops.batchnorm
    yield ops.moments.default, (x, None, None, None)
    yield ops.moments.default, (x, None, torch.tensor(9.0), weights)
    yield ops.forward.default, (x, None, 1e-5, *e)
    yield ops.forward.default, (arranged(x, "interleaved"), None, 1e-5, *e)
    yield ops.normalize.default, (x, mean, rstd, *e)
    yield ops.reduce_grad.default, (dy, x, mean, rstd, *e, False)
    yield ops.input_grad.default, (dy, x, mean, rstd, mean, rstd, None, *e, False, True)
    yield ops.input_grad.default, (dy, x, mean, rstd, mean, rstd, weights, *e, False, True)
    yield ops.backward.default, (dy, x, mean, rstd, None, False, *e, False, True, True)
    counters = torch.tensor(1), torch.tensor(0)
    yield ops.infer.default, (x, mean, rstd, 1e-5, *e)
    yield (
        ops.update_running.default,
        (torch.zeros(3), torch.ones(3), *counters, mean, rstd, None, 20.0, 0.1, True, True),
    )
    buffers = (torch.zeros(3), torch.ones(3), torch.tensor(1), torch.tensor(0))
    step, last = (torch.rand(3), None, residual), arranged(residual, "interleaved")
    yield ops.training_step.default, (x, *step, *buffers, 0.1, True, True, 1e-5, 1, 0.0)
    yield ops.training_step.default, (x, torch.rand(3), None, last, *buffers, 0.1, True, True, 1e-5, 1, 0.0)
    statistics = torch.ones(2, 3).double(), torch.ones(4, 3).double()
    yield ops.training_step_backward.default, (dy, x, statistics[0], *step, 1, 0.0, True, True, True)
    yield ops.training_step_backward.default, (dy, x, statistics[0], *step, 1, 0.0, False, True, False)
    bounds = torch.tensor(1.5), torch.tensor(0.5)
    yield ops.forward_renormalized.default, (x, None, 1e-5, torch.zeros(3), torch.ones(3), *bounds, *e)
    yield (
        ops.renormalization_step.default,
        (x, *step, *buffers, 0.1, True, True, 1.5, 0.5, 0.0, 1e-5, 1, 0.0),
    )
    wants_dx = False, False, True
    yield ops.training_step_backward.default, (dy, x, statistics[1], torch.rand(3), None, None, 1, 0.0, *wants_dx)
    yield ops.inference_step.default, (x, *step, *buffers[:2], 1e-5, 1, 0.0)
    yield ops.inference_step_backward.default, (dy, x, statistics[0], *(None,) * 3, 0, 0.0, *(False,) * 3)


@pytest.mark.parametrize("call", range(20))
def test_operators_keep_torchs_rules(call):
    operator, arguments = list(operator_calls())[call]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(layout, dynamic):
    shape = (4, 6, 5, 5)
    x, dy, residual = tensors(shape, torch.float32, layout)
    layer = bn.BatchNorm2d(6, activation="relu")
    other = bn.BatchNorm2d(6, activation="relu")
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (4, 3):
        inputs = [
            [t[:n].clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, residual)] for _ in "12"
        ]
        y, compiled_y = layer(*inputs[0]), compiled(*inputs[1])
        assert compiled_y.stride() == y.stride()
        torch.testing.assert_close(compiled_y, y)
        y.backward(dy[:n])
        compiled_y.backward(dy[:n])
        for found, expected in zip(inputs[1], inputs[0], strict=True):
            torch.testing.assert_close(found.grad, expected.grad)
        torch.testing.assert_close(other.running_var, layer.running_var)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child():
    """A child has none of its parent's threads; waiting for them would be for ever."""
    torch.set_num_threads(2)
    x, _, _ = tensors((8, 64, 30, 30), torch.float32)
    expected = cpu.forward(x, 1e-5, Epilogue())[0]
    child = os.fork()
    if child == 0:
        found = cpu.forward(x, 1e-5, Epilogue())[0]
        torch.set_num_threads(1)  # torch's own operators would wait
        os._exit(0 if found.equal(expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_several_python_threads():
    torch.set_num_threads(2)
    x, _, _ = tensors((8, 64, 30, 30), torch.float32)
    expected = cpu.forward(x, 1e-5, Epilogue())[0]
    found: list[Tensor] = []

    def work():
        for _ in range(5):
            found.append(cpu.forward(x, 1e-5, Epilogue())[0])

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 15
    assert all(y.equal(expected) for y in found)


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0


@pytest.mark.slow
@pytest.mark.skipif(free_memory() < 16 << 30, reason="needs 16 GiB of free memory")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_elements_than_int32_counts(layout):
    torch.set_num_threads(2)
    N, C, S = 3, 2, 357_913_943  # 2^31 + 10 elements
    x = torch.zeros((N, C, S) if layout == "planar" else (N, S, C), dtype=torch.float16)
    x = x if layout == "planar" else x.movedim(-1, 1)
    assert x.numel() > 2**31
    x[-1, -1, -4:] = torch.tensor([1.0, 2.0, -3.0, 4.0])
    y, batch, rstd, *_ = cpu.forward(x, 1e-5, Epilogue(activation=Activation("relu")))
    assert batch.mean.tolist() == [0.0, pytest.approx(4.0 / (N * S), rel=1e-12)]
    assert batch.m2.tolist() == [0.0, pytest.approx(30.0, rel=1e-6)]
    last = ((x[-1, -1, -4:].double() - batch.mean[1]) * rstd[1]).relu().half()
    assert_same_bits("y", y[-1, -1, -4:], last)


# More values than are computed in float64 throughout; test_accuracy.py has the small tensors.
LARGE = {
    "planes side by side": (64, 8, 14, 14),
    "odd planes side by side": (16, 20, 7, 7),
    "few channels": (32, 3, 14, 14),
    "planes": (4, 5, 40, 41),
    "few samples": (3, 67, 10, 10),
    "two axes": (256, 40),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_budget(dtype, shape, layout):
    """The error of y and of the gradients is at most twice torch's own on the same values, planar, or half an ulp."""
    numbers = torch.Generator().manual_seed(0)
    weight, bias = torch.rand(shape[1], generator=numbers), torch.randn(shape[1], generator=numbers)
    for mean, scale in product((0.0, 1e2, 1e4), (1e-3, 1.0, 1e3)):
        x = (scale * torch.randn(shape, generator=numbers) + mean).to(dtype)
        dy = torch.randn(shape, generator=numbers).to(dtype)

        def step(function, *inputs, dy=dy):
            leaves = [value.detach().clone().requires_grad_() for value in inputs]
            y = function(leaves[0], None, None, *leaves[1:], True)
            y.backward(dy.to(y.dtype))
            return y.detach(), *(leaf.grad for leaf in leaves)

        for name, *values in zip(
            ("y", "dx", "dweight", "dbias"),
            step(bn.functional.batch_norm, arranged(x, layout), weight, bias, dy=arranged(dy, layout)),
            step(F.batch_norm, x, weight, bias),
            step(F.batch_norm, x.double(), weight.double(), bias.double()),
            strict=True,
        ):
            assert_within_budget(f"{name} at mean {mean}, scale {scale}", *values)
