"""Which calls the programs compute, and what a program that fails costs: nothing but speed."""

from __future__ import annotations

import copy
import inspect
import re
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import env, kernels
from batchnorm.functional.reduction import Reducer
from batchnorm.kernels import Epilogue, aten, eager, gpu
from batchnorm.kernels.gpu import dispatch, launches, plans, self_check, trust
from batchnorm.kernels.gpu.plans import Plan
from batchnorm.kernels.gpu.programs import backward as backward_programs
from batchnorm.kernels.gpu.programs import channels as channel_programs
from batchnorm.kernels.gpu.programs import forward as forward_programs
from batchnorm.moments import Moments
from tests.budget import assert_same_bits
from tests.gpu.conftest import DEVICE
from tests.gpu.plans_of_tests import ALL, SPLIT, WAYS, WHOLE, use

# Every program of the fused pairs, with the way of the plan that launches it.
PROGRAMS = [
    (forward_programs, "partial_sums", "split"),
    (forward_programs, "finish", "split"),
    (forward_programs, "apply", "split"),
    (backward_programs, "partial_gradient_sums", "split"),
    (backward_programs, "finish_gradient_sums", "split"),
    (backward_programs, "apply_gradient", "split"),
    (forward_programs, "whole", "whole"),
    (backward_programs, "whole_gradient", "whole"),
    (forward_programs, "in_registers", "in_registers"),
    (channel_programs, "update", "whole"),
]
# Every program of the verbs, which synchronized layers and inference launch one by one.
VERBS = [*PROGRAMS[:6], (channel_programs, "prepare", "whole")]


class Alone(Reducer):
    """A group of one replica: the verbs, with nothing between them."""

    size = 2

    def merge(self, moments: Moments) -> Moments:
        return moments

    def sum(self, sum_grad, sum_grad_xhat):
        return sum_grad, sum_grad_xhat


# How a program fails, and what is said of it.
SAID = {"compile": "PassManager::run failed", "launch": "shared memory", "garbage": "its self-check found"}
HOW = list(SAID)


class Broken:
    """A program that does not compile, does not start, or computes nothing."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __getitem__(self, grid):
        if self.way == "compile":
            raise RuntimeError("PassManager::run failed")

        def launched(*operands, **constants):
            if self.way == "launch":
                raise RuntimeError("out of resource: shared memory")

        return launched


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """On the CPU too, the programs come before torch's operators."""
    monkeypatch.setattr(aten, "DEVICES", (DEVICE,))
    monkeypatch.setattr(kernels, "KERNELS", (gpu, aten, eager))


def step(layer: nn.Module, x: torch.Tensor, **beside: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients and buffers of a training step."""
    given = x.clone().requires_grad_()
    y = layer(given, **beside)
    y.square().sum().backward()
    return [y.detach(), given.grad, *(p.grad for p in layer.parameters()), *(b.clone() for b in layer.buffers())]


def said_by_env(monkeypatch) -> str:
    """The line of `batchnorm env` on the programs, as on a machine with a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(env, "choices", list)
    return env.environment().kernels["gpu"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("module", "name", "way"), PROGRAMS, ids=[name for _, name, _ in PROGRAMS])
def test_a_program_that_fails_costs_only_speed(module, name, way, how, monkeypatch):
    use(monkeypatch, WAYS[way])
    layer = bn.BatchNorm1d(3, activation="relu").to(DEVICE)
    x, residual = (torch.randn(8, 3, 7, device=DEVICE) for _ in "12")
    expected = []
    with monkeypatch.context() as without:
        without.setattr(kernels, "KERNELS", (aten, eager))
        other = copy.deepcopy(layer)
        expected = [step(other, x), step(other, x, residual=residual)]
    monkeypatch.setattr(module, name, Broken(how))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [step(layer, x), step(layer, x, residual=residual)]
    assert len(caught) == 1
    assert "torch's speed and accuracy" in str(caught[0].message)
    for one, other in zip(found, expected, strict=True):
        for value, exact in zip(one, other, strict=True):
            assert_same_bits("the layer's result", value, exact)
    said = SAID[how]
    reason = gpu.refuses(x, Epilogue())
    assert reason is not None
    assert said in reason
    assert said in said_by_env(monkeypatch)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("module", "name"), [verb[:2] for verb in VERBS], ids=[name for _, name, _ in VERBS])
def test_a_verb_that_fails_costs_only_speed(module, name, how, monkeypatch):
    """The pairs of the plan, which are other programs, still run."""
    use(monkeypatch, WHOLE)
    layer = bn.BatchNorm1d(3, activation="relu").to(DEVICE)
    x, residual = (torch.randn(8, 3, 7, device=DEVICE) for _ in "12")

    def results(layer: nn.Module) -> list[torch.Tensor]:
        layer.reducer = Alone()
        found = step(layer.train(), x, residual=residual)
        layer.reducer = None
        return [*found, *step(layer.eval(), x), *step(layer, x, residual=residual)]

    with monkeypatch.context() as without:
        without.setattr(kernels, "KERNELS", (aten, eager))
        expected = results(copy.deepcopy(layer))
    monkeypatch.setattr(module, name, Broken(how))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = results(layer)
    assert len(caught) == 1
    assert 'the plan "whole, float32, verb by verb" would' in str(caught[0].message)
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)
    assert gpu.refuses(x, Epilogue()) is None
    why = said_by_env(monkeypatch)
    assert "verb by verb" in why
    assert SAID[how] in why


@pytest.mark.parametrize("how", HOW)
def test_running_statistics_whose_program_fails(how, monkeypatch):
    """Another plan never launches `update`; the general path does, with a mask."""
    use(monkeypatch, SPLIT)
    monkeypatch.setattr(channel_programs, "update", Broken(how))
    layer = bn.BatchNorm1d(3).to(DEVICE)
    x = torch.randn(8, 3, 7, device=DEVICE)
    mask = torch.ones(8, 7, dtype=torch.bool, device=DEVICE)
    with pytest.warns(RuntimeWarning, match='the plan "running statistics" would') as caught:
        layer(x, mask=mask)
    layer(x, mask=mask)  # a warning would be an error here
    assert len(caught) == 1
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2)) * 0.19)
    assert gpu.refuses(x, Epilogue()) is None
    why = said_by_env(monkeypatch)
    assert "running statistics" in why
    assert SAID[how] in why


def test_every_program_is_broken_by_a_test():
    launched = re.findall(r"(?:forward|backward|channel)_programs\.(\w+)", inspect.getsource(launches))
    assert {name for _, name, _ in PROGRAMS + VERBS} == set(launched)


@pytest.mark.parametrize("name", ["partial_sums", "finish", "apply", "partial_gradient_sums", "apply_gradient"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "add"])
def test_without_the_self_check_a_failure_is_caught_at_the_call(name, residual, monkeypatch):
    """The running statistics are updated once, whichever launch fails."""
    use(monkeypatch, SPLIT)
    monkeypatch.setenv(trust.CHECK, "off")
    module = next(module for module, each, _ in PROGRAMS if each == name)
    layer = bn.BatchNorm1d(3, activation="silu").to(DEVICE)
    x = torch.randn(8, 3, 7, device=DEVICE)
    beside = {"residual": torch.randn_like(x)} if residual else {}
    with monkeypatch.context() as without:
        without.setattr(kernels, "KERNELS", (aten, eager))
        other = copy.deepcopy(layer)
        expected = [step(other, x, **beside), step(other, x, **beside)]
    monkeypatch.setattr(module, name, Broken("launch"))
    with pytest.warns(RuntimeWarning, match="shared memory") as caught:
        found = [step(layer, x, **beside), step(layer, x, **beside)]
    assert len(caught) == 1
    for one, other in zip(found, expected, strict=True):
        for value, exact in zip(one, other, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5)


def test_a_small_difference_fails_the_self_check(monkeypatch):
    """Not garbage alone: a variance that is divided by another count."""
    use(monkeypatch, SPLIT)
    train = launches.train

    def biased(x, y, statistics, given, eps, updated=None):
        again = train(x, y, statistics, given, eps, updated)
        launches.Statistics.of(statistics).m2.mul_(1.02)
        return again

    monkeypatch.setattr(launches, "train", biased)
    with pytest.warns(RuntimeWarning, match="found M2 off by"):
        assert gpu.refuses(torch.randn(8, 3, 7, device=DEVICE), Epilogue()) is not None


def test_memory_that_runs_out_is_not_a_failure(monkeypatch):
    use(monkeypatch, SPLIT)
    monkeypatch.setenv(trust.CHECK, "off")

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launches, "moments", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        gpu.moments(torch.randn(8, 3, 7, device=DEVICE), None)
    assert trust.failures() == []


def test_it_can_be_switched_off(monkeypatch):
    use(monkeypatch, SPLIT)
    monkeypatch.setenv(dispatch.SWITCH, "off")
    dispatch.unavailable.cache_clear()
    x = torch.randn(8, 3, 7, device=DEVICE)
    assert gpu.refuses(x, Epilogue()) == gpu.status() == "BATCHNORM_GPU=off"
    assert gpu.steps_for(x, x) is None
    assert kernels.select(x, Epilogue()) is aten


def test_the_environment_sets_the_least_number_of_bytes(monkeypatch):
    """With CUDA graphs the host only starts the step, so smaller tensors are worth the launches."""
    given = shape("interleaved", "bfloat16", 256 * 14 * 14, 256)
    assert plans.left_to_torch(given) is not None
    for value, least in (("20000000", 20_000_000), ("0", 0)):
        monkeypatch.setenv(plans.LEAST, value)
        found = plans.read()
        assert [plan.bytes_below for plan in found if plan.name == "small"] == [least]
        use(monkeypatch, *found)
        assert plans.left_to_torch(given) is None
    monkeypatch.setenv(plans.LEAST, "20 MB")
    dispatch.unavailable.cache_clear()
    assert gpu.status() == "BATCHNORM_GPU_BYTES must be a number of bytes, but is '20 MB'"
    assert gpu.steps_for(torch.randn(8, 3, 7, device=DEVICE), torch.zeros(3, device=DEVICE)) is None


def test_without_triton_torchs_operators_run(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda _: None)
    dispatch.unavailable.cache_clear()
    x = torch.randn(8, 3, 7, device=DEVICE)
    assert gpu.refuses(x, Epilogue()) == "Triton is not installed"
    assert kernels.select(x, Epilogue()) is aten


def test_what_it_refuses(monkeypatch):
    use(monkeypatch, SPLIT)
    monkeypatch.setenv(trust.CHECK, "off")
    x = torch.randn(8, 3, 7, device=DEVICE)
    wide = torch.ones(3, dtype=torch.float64, device=DEVICE)
    for given, epilogue in (
        (x.double(), Epilogue()),
        (x[:, :, ::2], Epilogue()),
        (x[:0], Epilogue()),
        (x, Epilogue(wide)),
        (x, Epilogue(sample_weights=torch.ones(8, 1, 1, dtype=torch.float64, device=DEVICE))),
        (x, Epilogue(residual=x.half())),
        (nn.Parameter(x), Epilogue()),
    ):
        assert isinstance(gpu.refuses(given, epilogue), str)
    assert gpu.refuses(x.to("meta"), Epilogue()) == "x is on meta"
    assert gpu.refuses(x, Epilogue(mask=torch.ones(8, 1, 7, dtype=torch.bool)), plain=False) is None


def shape(layout: str, dtype: str, rows: int, channels: int, positions: int = 1) -> plans.Shape:
    return plans.Shape(dtype, layout == "planar", rows, channels, positions)


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        (shape("interleaved", "bfloat16", 256 * 56 * 56, 64), "interleaved"),
        (shape("interleaved", "float32", 256 * 7 * 7, 2048), "interleaved"),
        (shape("planar", "bfloat16", 256, 64, 112 * 112), "planar"),
        (shape("planar", "bfloat16", 256, 1024, 14 * 14), "planar, channel in the L2 cache"),
        (shape("planar", "float32", 256, 1024, 14 * 14), "planar"),
        (shape("planar", "float32", 128, 2048, 7 * 7), "planar, channel in registers"),
        (shape("planar", "bfloat16", 256, 2048, 7 * 7), "odd planes"),
        (shape("planar", "bfloat16", 256, 2047, 9 * 9), None),
        (shape("planar", "float16", 64, 2048, 15 * 15), None),
        (shape("interleaved", "float16", 256 * 56 * 56, 33), None),
        (shape("planar", "float32", 2, 3, 5), None),
        (shape("interleaved", "bfloat16", 256 * 14 * 14, 256), None),
        (shape("interleaved", "float32", 256 * 14 * 14, 256), "interleaved"),
        (shape("planar", "float32", 2, 2**20, 2**12), None),
    ],
)
def test_the_table_decides(given, plan):
    found = plans.left_to_torch(given) or plans.cut(given)
    assert (None if isinstance(found, str) else found.plan.name) == plan


def test_torchs_operators_come_first_only_for_what_they_accept(monkeypatch):
    """Small tensors, unless there is a mask: plain torch operations in float64 would compute that."""
    use(monkeypatch, Plan("small", "none", "it is small", bytes_below=4000), SPLIT)
    monkeypatch.setenv(trust.CHECK, "off")
    x, mask = torch.randn(8, 3, 7, device=DEVICE), torch.ones(8, 1, 7, dtype=torch.bool, device=DEVICE)
    assert gpu.refuses(x, Epilogue()) == "it is small"
    assert gpu.steps_for(x, x) is None
    assert gpu.refuses(x, Epilogue(mask=mask)) is None
    assert gpu.refuses(x, Epilogue(), plain=False) is None
    assert gpu.forward(x, 1e-5, Epilogue(mask=mask)).output.isfinite().all()
    assert gpu.steps_for(torch.randn(64, 3, 7, device=DEVICE), x) is not None


def test_every_plan_says_why_and_is_of_use():
    """Each row is the first for some shape."""
    shapes = [
        shape(layout, dtype, rows, channels, positions)
        for layout, sizes in (("planar", (49, 196, 3136, 3137, 12544)), ("interleaved", (1,)))
        for positions in sizes
        for dtype in plans.DTYPES
        for rows in (2, 32, 256, 65536)
        for channels in (64, 512, 2048)
    ]
    first = {next(plan for plan in plans.table() if plan.fits(each)) for each in shapes}
    assert first == set(plans.table())
    assert all(len(plan.why) > 20 for plan in plans.table())
    assert {plan.way for plan in plans.table()} == {"none", *WAYS}


@pytest.mark.parametrize(("positions", "unit", "width"), [(3136, 16, 64), (196, 4, 32), (49, 1, 64), (1024, 16, 1024)])
def test_a_tile_is_as_wide_as_wastes_little(positions, unit, width):
    plan = next(plan for plan in plans.table() if plan.way == "split" and plan.layout == "planar" and not plan.flat)
    found = plans.cut_by(plan, shape("planar", "bfloat16", 256, 64, positions))
    assert (found.unit, found.width, found.height) == (unit, width, min(plan.tile // width, 256))


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL)
def test_the_tiles_are_as_many_as_the_values_need(plan):
    """Each program of the reduction has values to read, and no tile lies beside x."""
    for sizes in ((256, 64, 49), (130, 24, 7), (5, 3, 100), (16, 3, 16)):
        found = plans.cut_by(plan, shape("planar", "bfloat16", *sizes))
        rows, channels, positions = sizes
        columns = channels * positions if plan.flat else positions
        down, across = -(-rows // found.height), -(-columns // found.width)
        assert found.tiles * found.blocks == down * across * (1 if plan.flat else channels)
        assert 1 <= found.pieces <= found.tiles


def test_offsets_beyond_32_bits_are_refused():
    plan = Plan("huge", "split", "a test")
    assert plans.cut_by(plan, shape("interleaved", "float32", 2**31 - 4096, 64)).beyond is None
    for given in (
        shape("interleaved", "float32", 2**31 - 1, 1),  # the row after the last tile has no number of 32 bits
        shape("interleaved", "float32", 2**33, 64),
        shape("planar", "float32", 1, 1, 2**31),
    ):
        assert "2^31 rows or columns" in str(plans.cut_by(plan, given).beyond)
    assert plans.cut_by(plan, shape("planar", "float32", 64, 2**20, 2**12)).beyond is not None


@pytest.mark.parametrize("name", ["weight", "bias", "residual", "mask"])
def test_an_operand_on_another_device_is_not_a_failure(name, monkeypatch):
    """Forgotten `.to("cuda")`: torch says so, and the plan is still good."""
    use(monkeypatch, SPLIT)
    monkeypatch.setenv(trust.CHECK, "off")
    x = torch.randn(8, 3, 7, device=DEVICE)
    given = {"weight": x[0, :, 0], "bias": x[0, :, 0], "residual": x, "mask": x[:, :1] > 0}[name]
    elsewhere = given.to("cpu" if DEVICE == "cuda" else "meta")
    reason = gpu.refuses(x, Epilogue(**{name: elsewhere}))
    assert reason == f"x is on {x.device}, and the {name} on {elsewhere.device}"
    running = torch.zeros(3, device=elsewhere.device)
    with pytest.raises(RuntimeError):
        gpu.infer(x, running, running, 1e-5, Epilogue())[0].cpu()
    assert trust.failures() == []


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_check_cuts_its_tensor_like_the_real_one(plan, dtype):
    """Triton compiles the same programs for both: the constants are equal. And the tensor is small."""
    planar = [(256, 64, 56 * 56), (128, 2048, 7 * 7), (200, 96, 15 * 15), (64, 1024, 14 * 14)]
    if plan.way == "in_registers":
        planar = [(10, 1024, 7 * 7), (16, 64, 28)]
    shapes = [shape("planar", dtype, *sizes) for sizes in planar]
    if plan.way != "in_registers" and not plan.flat:
        shapes += [
            shape("interleaved", dtype, rows, channels) for rows in (50000, 7) for channels in (33, 64, 200, 1024)
        ]
    for each in shapes:
        real = plans.cut_by(plan, each)
        like = self_check.small(real)
        for one, other in ((real, like), (real.backward, like.backward)):
            assert (one.unit, one.even, one.height, one.width) == (other.unit, other.even, other.height, other.width)
        assert like.shape.rows * like.shape.channels * like.shape.positions < 2e5


@pytest.mark.skipif(DEVICE == "cuda", reason="it is about a call that is not captured here")
def test_the_first_use_is_not_in_the_capture_of_a_graph(monkeypatch):
    use(monkeypatch, SPLIT)
    x = torch.randn(8, 3, 7)
    with monkeypatch.context() as capture:
        capture.setattr(trust, "_capturing", lambda _: True)
        assert "capture of a CUDA graph" in str(gpu.refuses(x, Epilogue()))
    assert gpu.refuses(x, Epilogue()) is None
    monkeypatch.setattr(trust, "_capturing", lambda _: True)
    assert gpu.refuses(x, Epilogue()) is None
