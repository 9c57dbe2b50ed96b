"""The Triton programs against the formula in float64: every verb, layout, dtype and epilogue, far means, gaps and poison."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from batchnorm.kernels import Activation, Epilogue, Groups, Normalized, Renormalization, Running, Update, eager, gpu
from batchnorm.kernels.activation import ROWS
from batchnorm.kernels.gpu import dispatch, memory, trust
from batchnorm.moments import Moments
from tests.budget import assert_same_bits, assert_ulps, error_in_ulps
from tests.gpu.conftest import DEVICE
from tests.gpu.plans_of_tests import ALL, FLAT, SPLIT, WAYS, WHOLE, use

if DEVICE == "cpu":
    from tests.gpu import interpreter
    from tests.gpu.interpreter import counted_programs
else:
    counted_programs = contextlib.nullcontext

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered:RuntimeWarning")
    for what in ("overflow", "invalid value", "divide by zero")
]  # numpy's, of what a GPU computes in silence
LAYOUTS = ("planar", "last")
MOST_PROGRAMS = 50  # of a launch: the interpreter takes milliseconds for each
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    layout: str = "planar"
    mean: float = 0.0
    activation: str | None = None
    residual: bool = False
    mask: bool = False
    way: str = "split"

    @property
    def name(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype)[6:], self.layout, self.way, f"mean {self.mean:g}"]
        return " ".join(
            [*parts, *(["add"] if self.residual else []), self.activation or "", "mask" if self.mask else ""]
        )


CASES = [
    Case((4, 6, 5, 7), F32, "planar", 0.0, "relu"),
    Case((4, 6, 5, 7), F32, "planar", 1e4, None, True),
    Case((4, 6, 5, 7), F32, "planar", 1e4, "silu", False, True),
    Case((4, 6, 4, 8), F32, "planar", 2.0, "relu", True),  # no tile has gaps
    Case((4, 6, 5, 7), BF16, "planar", 3.0, "relu", True),
    Case((3, 4, 50), BF16, "planar", 5.0, "silu", True),
    Case((5, 3, 7, 7), F16, "planar", 1.0, "gelu", True, True, "in_registers"),
    Case((5, 3, 7, 7), F32, "planar", 1e4, "relu", True, False, "in_registers"),
    Case((5, 3, 6, 6), BF16, "planar", 1.0, "leaky_relu", True, False, "whole"),
    Case((5, 3, 6, 6), F32, "planar", 1e4, "relu", False, True, "whole"),
    Case((9, 4, 7), F32, "planar", 1e4, "silu", True, True, "flat"),
    Case((5, 3, 3, 3), BF16, "planar", 1.0, "relu", True, False, "flat"),
    Case((6, 20, 5, 5), F32, "last", 0.0, "relu", True),
    Case((6, 20, 5, 5), F32, "last", 1e4, "hardswish"),
    Case((6, 32, 4, 4), BF16, "last", 1.0, "relu", True, True),
    Case((6, 32, 4, 4), F32, "last", 1.0),
    Case((6, 20, 5, 5), F16, "last", 1.0, "relu6"),
    Case((6, 20, 3, 3), F32, "last", 100.0, "leaky_relu", True, False, "whole"),
    Case((37, 33), F32, "last", 10.0, "gelu_tanh"),
    Case((37, 33), F32, "last", 10.0, None, False, True),
    Case((16, 33), BF16, "last", 10.0, "relu", False, False, "in_registers"),
    Case((2, 3, 4, 5, 6), F32, "last", 5.0, "relu"),
    Case((2, 1, 9), F32, "planar", 5.0, "relu"),
]


class Inputs(NamedTuple):
    x: Tensor
    dy: Tensor
    epilogue: Epilogue


def made(case: Case) -> Inputs:
    shape, C = case.shape, case.shape[1]
    along = (1, C, *[1] * (len(shape) - 2))
    x = (torch.randn(shape) * (torch.rand(along) + 0.5) + case.mean).to(case.dtype)
    dy, residual = torch.randn(shape).to(case.dtype), torch.randn(shape).to(case.dtype)
    mask = torch.rand(shape[0], 1, *shape[2:]) > 0.3 if case.mask else None
    if mask is not None:
        x = torch.where(mask, x, torch.nan)  # what is not counted may hold anything
    x, dy, residual = (laid_out(value, case.layout) for value in (x, dy, residual))
    activation = None if case.activation is None else Activation(case.activation)
    weight, bias = torch.randn(C), torch.randn(C)
    epilogue = Epilogue(weight, bias, residual if case.residual else None, mask, activation)
    on_device = (None if value is None else value.to(DEVICE) for value in epilogue[:4])
    return Inputs(x.to(DEVICE), dy.to(DEVICE), Epilogue(*on_device, activation))


def laid_out(value: Tensor, layout: str) -> Tensor:
    return value if layout == "planar" else value.movedim(1, -1).contiguous().movedim(-1, 1)


def exact(epilogue: Epilogue) -> Epilogue:
    wide = (None if value is None else value.double() for value in epilogue[:3])
    return Epilogue(*wide, *epilogue[3:])


@pytest.fixture(autouse=True)
def _without_self_check(monkeypatch):
    monkeypatch.setenv(trust.CHECK, "off")


@pytest.fixture(autouse=True)
def _nothing_fails():
    """What fails falls back on torch's operators, and would pass here."""
    yield
    assert trust.failures() == []


def close(what: str, found: Tensor, expected: Tensor, ulps: float = 3.0) -> None:
    """Half an ulp in half precision: it is computed wide and rounded once. In float32 a few ulps, which is what torch itself has."""
    assert_ulps(what, found.cpu(), expected.double().cpu(), ulps if found.dtype is F32 else 0.53)


def close_in_float32(what: str, found: Tensor, expected: Tensor, bound: float) -> None:
    """Of float64 values that were computed in float32: the largest error over the largest value."""
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    assert error.item() <= bound, f"{what}: {error.item():.2g}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_pairs_are_those_of_the_formula(case, monkeypatch):
    use(monkeypatch, ALL[case.way])
    x, dy, epilogue = made(case)
    assert gpu.refuses(x, epilogue) is None
    with memory.poisoned(), counted_programs() as programs:
        y, batch, rstd, *_ = gpu.forward(x, 1e-5, epilogue)
        wide = exact(epilogue)
        exact_y, exact_batch, exact_rstd, *_ = eager.forward(x.double(), 1e-5, wide)
        assert (y.dtype, y.stride()) == (x.dtype, x.stride())
        close("y", y, exact_y)
        deviation = exact_batch.variance().sqrt()
        assert ((batch.mean - exact_batch.mean).abs() / deviation).max() < 1e-6
        close_in_float32("M2", batch.m2 / exact_batch.m2, torch.ones_like(rstd), 2e-6)
        assert float(batch.count) == float(exact_batch.count)
        by = Normalized(batch.mean, rstd, batch.count)
        exact_by = Normalized(exact_batch.mean, exact_rstd, exact_batch.count)
        if epilogue.residual is not None and epilogue.activation and epilogue.activation.derivative_from_output:
            epilogue, wide = (
                each._replace(residual=None, output=given) for each, given in ((epilogue, y), (wide, y.double()))
            )
        for count in (batch.count, None):
            found = gpu.backward(dy, x, by._replace(count=count), epilogue)
            expected = eager.backward(dy.double(), x.double(), exact_by._replace(count=count), wide)
            assert found.input is not None
            assert expected.input is not None
            close("dx", found.input, expected.input, 8.0)
            close_in_float32("the sum of g", found.sum_grad, expected.sum_grad, 2e-6)
            close_in_float32("the sum of g · x̂", found.sum_grad_xhat, expected.sum_grad_xhat, 2e-6)
            if found.residual is not None or expected.residual is not None:
                close("dresidual", found.residual, expected.residual)
        assert (
            gpu.backward(dy, x, by, epilogue._replace(residual=None, output=None), needs_input_grad=False).input is None
        )
    if DEVICE == "cpu":
        assert 0 < max(programs) <= MOST_PROGRAMS


@pytest.mark.parametrize("layout", ["planar", "last"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_verbs_are_those_of_the_formula(layout, dtype, monkeypatch):
    use(monkeypatch, SPLIT)
    x, dy, epilogue = made(Case((4, 5, 6), dtype, layout, 20.0, "silu", True, layout == "last"))
    wide, wide_x, wide_dy = exact(epilogue), x.double(), dy.double()
    with memory.poisoned():
        batch, exact_batch = gpu.moments(x, epilogue.mask), eager.moments(wide_x, epilogue.mask)
        assert (batch.mean.dtype, batch.m2.dtype) == (torch.float64, torch.float64)
        close_in_float32("mean", batch.mean, exact_batch.mean, 1e-7)
        close_in_float32("M2", batch.m2, exact_batch.m2, 1e-6)
        mean, rstd = exact_batch.mean, exact_batch.rstd(1e-5)
        close("normalize", gpu.normalize(x, mean, rstd, epilogue), eager.normalize(wide_x, mean, rstd, wide))
        running = mean.float(), exact_batch.variance().float()
        y, found_mean, found_rstd = gpu.infer(x, *running, 1e-5, epilogue)
        exact_y, exact_mean, exact_rstd = eager.infer(wide_x, *running, 1e-5, wide)
        close("infer", y, exact_y)
        assert torch.equal(found_mean, exact_mean)
        close_in_float32("rstd", found_rstd, exact_rstd, 1e-12)
        sums = gpu.reduce_grad(dy, x, mean, rstd, epilogue)
        exact_sums = eager.reduce_grad(wide_dy, wide_x, mean, rstd, wide)
        for one, other in zip(sums, exact_sums, strict=True):
            close_in_float32("reduce_grad", one, other, 1e-6)
        means = exact_sums[0] / 20, exact_sums[1] / 20
        for one, other in zip(
            gpu.input_grad(dy, x, mean, rstd, epilogue, means),
            eager.input_grad(wide_dy, wide_x, mean, rstd, wide, means),
            strict=True,
        ):
            assert one is not None
            assert other is not None
            close("input_grad", one, other, 6.0)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("slope", [0.01, -0.5])
def test_activations_are_those_of_the_table(name, slope, monkeypatch):
    """Value and derivative at and around every kink, and NaN stays NaN."""
    if slope < 0 and not ROWS[name].has_slope:
        pytest.skip("it has no slope")
    use(monkeypatch, SPLIT)
    special = torch.tensor([-30.0, -6.0, -3.0, -1e-3, -0.0, 0.0, 1e-3, 3.0, 6.0, 6.001, 30.0, torch.nan])
    x = torch.cat([special, torch.linspace(-5, 8, 52)]).view(32, 2).to(DEVICE)
    activation = Activation(name, slope)
    mean, rstd = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE).add(torch.tensor([[0.0], [1.0]], device=DEVICE))
    epilogue = Epilogue(activation=activation)
    y, expected = gpu.normalize(x, mean, rstd, epilogue), activation(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    dx = gpu.input_grad(torch.ones_like(x), x, mean, rstd, epilogue, None)[0]
    torch.testing.assert_close(dx.double(), activation.derivative(x.double()), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_first_tile_far_from_the_rest(way, monkeypatch):
    """Zeros before data at 1e4: the sums about the first tile's mean have no digits, so they are taken again."""
    use(monkeypatch, WAYS[way])
    x = torch.randn(16, 2, 32) + 1e4
    x[0] = 0.0
    x[1, :, :4] = 0.0
    x = x.to(DEVICE)
    found, expected = gpu.forward(x, 1e-5, Epilogue()).moments, eager.moments(x.double(), None)
    close_in_float32("M2", found.m2, expected.m2, 3e-7)
    x = (torch.randn(16, 2, 32) * 1e-2 + 1e4).to(DEVICE)
    x[:2] = x[:2] - 1.0  # a hundred deviations of what follows
    found, expected = gpu.forward(x, 1e-5, Epilogue()).moments, eager.moments(x.double(), None)
    close_in_float32("M2", found.m2, expected.m2, 2e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_channel(way, bad, monkeypatch):
    use(monkeypatch, WAYS[way])
    x = torch.randn(4, 3, 5, 7, device=DEVICE)
    x[1, 2, 3, 4] = bad
    y, batch, *_ = gpu.forward(x, 1e-5, Epilogue())
    assert y[:, 2].isnan().all()
    assert y[:, :2].isfinite().all()
    assert not batch.m2[2].isfinite()


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_that_counts_nothing(way, monkeypatch):
    use(monkeypatch, WAYS[way])
    x = torch.full((4, 3, 7), torch.nan, device=DEVICE)
    mask = torch.zeros(4, 1, 7, dtype=torch.bool, device=DEVICE)
    y, batch, rstd, *_ = gpu.forward(x, 1e-5, Epilogue(mask=mask))
    assert float(batch.count) == 0
    assert y.eq(0).all()
    assert batch.mean.eq(0).all()
    assert batch.m2.eq(0).all()
    dx = gpu.backward(torch.ones_like(x), x, Normalized(batch.mean, rstd, batch.count), Epilogue(mask=mask)).input
    assert dx is not None
    assert dx.eq(0).all()


@pytest.mark.parametrize(
    ("layout", "plan"), [("planar", SPLIT), ("last", SPLIT), ("planar", FLAT)], ids=["planar", "last", "flat"]
)
def test_groups_are_normalized_apart(layout, plan, monkeypatch):
    use(monkeypatch, plan)
    x, dy, epilogue = made(Case((7, 3, 4), F32, layout, 3.0, "relu", True, True))
    groups = Groups(3, 2)
    found, expected = gpu.forward(x, 1e-5, epilogue, groups), eager.forward(x, 1e-5, epilogue, groups)
    close("y", found.output, expected.output.double())
    for one, other in zip(found.moments, expected.moments, strict=True):
        close_in_float32("moments", one, other, 1e-6)
    by = Normalized(expected.moments.mean, expected.rstd, expected.moments.count)
    grads = gpu.backward(dy, x, by, epilogue, True, groups)
    exact_grads = eager.backward(dy.double(), x.double(), by, exact(epilogue), True, groups)
    close("dx", grads.input, exact_grads.input, 6.0)
    close("dresidual", grads.residual, exact_grads.residual)
    close_in_float32("Σg", grads.sum_grad, exact_grads.sum_grad, 1e-6)
    close_in_float32("Σg·x̂", grads.sum_grad_xhat, exact_grads.sum_grad_xhat, 2e-6)


def test_batch_renormalization(monkeypatch):
    use(monkeypatch, SPLIT)
    x, _, epilogue = made(Case((8, 3, 4), F32, "planar", 1.0, "relu"))
    bounds = torch.tensor([2.0, 1.0], device=DEVICE)
    renormalization = Renormalization(torch.randn(3, device=DEVICE), torch.rand(3, device=DEVICE) + 0.5, *bounds)
    found = gpu.forward_renormalized(x, 1e-5, epilogue, renormalization)
    expected = eager.forward_renormalized(x, 1e-5, epilogue, renormalization)
    close("y", found.output, expected.output.double())
    for one, other in zip(found.correction or (), expected.correction or (), strict=True):
        close_in_float32("r and d", one, other, 1e-6)


@pytest.mark.parametrize("buffers", [F32, torch.float64, F16, BF16], ids=str)
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "not finite"])
@pytest.mark.parametrize("unbiased", [True, False], ids=["unbiased", "biased"])
def test_running_statistics(buffers, finite, unbiased):
    C = 5
    batch = Moments(8, torch.randn(C, dtype=torch.float64), torch.rand(C, dtype=torch.float64) * 9)
    if not finite:
        batch.m2[3] = 1e300 if buffers is not torch.float64 else torch.inf
    update = Update(0.3, unbiased, skip_nonfinite=True)
    results = []
    for kernel in (gpu, eager):
        torch.manual_seed(1)
        running = Running(
            *(value.to(buffers) for value in (torch.randn(C), torch.rand(C))), *torch.zeros(2, dtype=torch.int64)
        )
        running = Running(*(value.to(DEVICE) for value in running))
        trust._found["a plan", str(running.mean.device)] = None
        given = Moments(8, batch.mean.to(DEVICE), batch.m2.to(DEVICE))
        assert kernel.takes_update(running, given, update)
        results.append([kernel.update_running(running, given, update), *running])
    for one, other in zip(*results, strict=True):
        if DEVICE == "cuda":  # where a product and a sum are one operation
            torch.testing.assert_close(one, other)
        else:
            assert_same_bits("running statistics", one, other)
    assert [int(results[0][3]), int(results[0][4])] == [finite, not finite]


@pytest.mark.parametrize("count", [0.0, 1.0, 1.0001, 1.6, 2.0])
def test_a_count_that_only_the_device_knows(count):
    running = Running(torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE))
    ones = torch.ones(3, dtype=torch.float64, device=DEVICE)
    batch = Moments(torch.tensor(count, dtype=torch.float64, device=DEVICE), ones, ones)
    assert gpu.update_running(running, batch, Update(0.5)) is None
    assert running.mean.eq(0.5 if count > 1.5 else 0.0).all()
    variance = 0.5 + 0.5 / (count - 1) if count > 1.5 else 1.0  # of a sum of weights too, which is no whole number
    torch.testing.assert_close(running.variance, torch.full((3,), variance, device=DEVICE))


@pytest.mark.parametrize("case", [CASES[0], CASES[12], CASES[9]], ids=lambda case: case.name)
def test_the_same_bits_each_time_and_in_any_order(case, monkeypatch):
    """No program waits for another, and none adds to another's sum: the order in which they run changes nothing."""
    use(monkeypatch, WAYS[case.way])
    x, dy, epilogue = made(case)

    def results():
        y, batch, rstd, *_ = gpu.forward(x, 1e-5, epilogue)
        return y, batch.mean, batch.m2, *gpu.backward(dy, x, Normalized(batch.mean, rstd, batch.count), epilogue)

    first = results()
    orders = [lambda n: n] * 5 if DEVICE == "cuda" else [lambda n: n[::-1], lambda n: n[1::2] + n[::2]]
    for order in orders:
        with contextlib.nullcontext() if DEVICE == "cuda" else interpreter.programs_in_order(order):
            for one, other in zip(first, results(), strict=True):
                if one is not None:
                    assert_same_bits("a result", other, one)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU does not count")
@pytest.mark.parametrize(
    ("way", "reads", "layout"),
    [
        *[
            (way, reads, layout)
            for way, reads in (("split", 2), ("whole", 2), ("in_registers", 1))
            for layout in LAYOUTS
        ],
        ("flat", 2, "planar"),
    ],
)
def test_x_is_read_as_often_as_the_plan_says(way, reads, layout, monkeypatch):
    """In the forward the first tile of each piece is read once more, for its mean: from the cache."""
    use(monkeypatch, ALL[way])
    x = laid_out(torch.randn(16, 3, 16), layout)
    dy, y = laid_out(torch.randn(16, 3, 16), layout), laid_out(torch.randn(16, 3, 16), layout)
    cut = dispatch.cut_of(x)
    assert not isinstance(cut, str)
    first_tiles = (
        0
        if way == "in_registers"
        else cut.pieces * cut.blocks * cut.height * min(cut.width, 16 if layout == "planar" else 3)
    )
    with interpreter.counted_reads(x=x) as counts:
        batch = gpu.forward(x, 1e-5, Epilogue())
    assert counts["x"] == reads * x.numel() + first_tiles
    by = Normalized(batch.moments.mean, batch.rstd, batch.moments.count)
    for epilogue in (Epilogue(), Epilogue(activation=Activation("relu"), output=y)):
        with interpreter.counted_reads(x=x, dy=dy, y=y) as counts:
            gpu.backward(dy, x, by, epilogue)
        assert counts == {"x": 2 * x.numel(), "dy": 2 * x.numel(), "y": 2 * x.numel() * (epilogue.output is not None)}


def test_a_gradient_in_another_layout_and_a_weight_with_gaps(monkeypatch):
    use(monkeypatch, WHOLE)
    x = torch.randn(4, 3, 8, device=DEVICE)
    weight = torch.rand(6, device=DEVICE)[::2]
    y, batch, rstd, *_ = gpu.forward(x, 1e-5, Epilogue(weight))
    close("y", y, eager.forward(x.double(), 1e-5, Epilogue(weight)).output)
    by = Normalized(batch.mean, rstd, batch.count)
    for dy in (torch.ones((), device=DEVICE).expand(4, 3, 8), torch.randn(8, 3, 4, device=DEVICE).permute(2, 1, 0)):
        dx = gpu.backward(dy, x, by, Epilogue(weight)).input
        assert dx is not None
        assert dx.stride() == x.stride()
        expected = eager.backward(dy.double(), x.double(), by, Epilogue(weight)).input
        assert (dx.double() - expected).abs().max() < 2e-6


def test_the_helpers_can_fail():
    with pytest.raises(AssertionError):
        close("bfloat16", torch.ones(1, dtype=BF16), torch.full((1,), 1.005))
    assert error_in_ulps(torch.ones(1), torch.full((1,), 1 + 5e-7).double()) > 3
