"""The programs compiled for GPUs that are not here: registers, stack and load widths, and what a compiler sees of the operators.

Not in the interpreter, whose programs are not compiled: `make interpret` runs this file by itself, on each release of Triton it knows.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("it needs Triton, and not its interpreter: `make interpret`", allow_module_level=True)

from batchnorm.kernels.gpu import operators, plans
from batchnorm.kernels.gpu.plans import Cut, Shape
from batchnorm.kernels.gpu.programs import backward, channels, forward
from tests.gpu.ahead_of_time import POINTERS, Machine, compiled

SIZES = dict.fromkeys(("pieces", "tiles", "rows", "channels", "positions", "blocks", "values", "columns"), "i32")
NUMBERS = dict.fromkeys(("eps", "eps_low", "momentum", "momentum_low", "slope"), "fp32")
TENSORS = ("x", "dy", "y", "residual", "beside", "dx", "dresidual")
WIDE = dict.fromkeys(("statistics", "mean", "rstd", "mean_g", "mean_gxhat", "spread"), "*fp64")
NARROW = dict.fromkeys(
    ("running_mean", "running_var", "weight", "bias", "coefs", "sums", "dweight", "dbias", "partial"), "*fp32"
)
COUNTERS = {"batches": "*i64", "skipped": "*i64", "arrivals": "*i32"}
LARGE = {  # ResNet-50 at batch 256, and what else has a plan of its own
    "interleaved": (False, 256 * 56 * 56, 64, 1),
    "planar": (True, 256, 64, 56 * 56),
    "14x14": (True, 256, 1024, 14 * 14),
    "odd planes": (True, 256, 2048, 7 * 7),
    "in registers": (True, 128, 2048, 64),
}
# Registers of a thread, of 8 warps: with 128 of them two programs share a processor, with 64 four.
MOST_REGISTERS = {
    "partial_sums": 128,
    "finish": 160,
    "apply": 80,
    "whole": 128,
    "in_registers": 128,
    "partial_gradient_sums": 128,
    "finish_gradient_sums": 64,
    "apply_gradient": 128,
    "whole_gradient": 128,
    "prepare": 64,
    "update": 128,
}
TARGETS = ("80", "90", "100", "gfx942")
CASES = [
    *[(target, "bfloat16", name) for target in TARGETS for name in ("interleaved", "planar", "14x14", "odd planes")],
    *[(target, "float32", name) for target in TARGETS for name in ("interleaved", "planar", "14x14")],
    *[("90", dtype, "in registers") for dtype in ("bfloat16", "float32")],
    ("90", "float16", "interleaved"),
]


def types(program: Any, dtype: str, **others: str) -> dict[str, str]:
    known = {**SIZES, **NUMBERS, **WIDE, **NARROW, **COUNTERS, **dict.fromkeys(TENSORS, POINTERS[dtype]), **others}
    return {name: known[name] for name in program.arg_names if name in known}


def cut_of(name: str, dtype: str) -> Cut:
    planar, *sizes = LARGE[name]
    found = plans.cut(Shape(dtype, planar, *sizes))
    assert not isinstance(found, str)
    return found


def machine(program: Any, cut: Cut, target: str, **constants: Any) -> Machine:
    """The program as it is launched for this cut."""
    tile = {"LAYOUT": cut.shape.layout, "UNIT": cut.unit, "BR": cut.height, "BK": cut.width}
    loop = {"EVEN": cut.even, "STAGES": cut.plan.stages}
    others = {"sums": "*fp64"} if program is backward.whole_gradient else {}
    given = types(program, cut.shape.dtype, **others)
    return compiled(program, given, {**tile, **loop, **constants}, target, cut.plan.warps)


def programs_of(cut: Cut) -> dict[str, dict[str, Any]]:
    """The programs of a forward and a backward of BN + add + ReLU, and what is constant in them."""
    activation = {"ACTIVATION": "relu"}
    derivative = {**activation, "FROM_OUTPUT": True, "CONSTANT": False, "OVER_COUNT": True}
    if cut.plan.way != "split":
        return {cut.plan.way: activation, "whole_gradient": derivative}
    return {"partial_sums": {}, "apply": activation, "partial_gradient_sums": derivative, "apply_gradient": derivative}


@pytest.mark.parametrize(("target", "dtype", "name"), CASES, ids=lambda value: value)
def test_programs_are_lean_and_load_wide(target, dtype, name):
    """No stack, no load of a single half-precision value, and the loop of the sums loads 16 bytes at a time, asynchronously."""
    cut = cut_of(name, dtype)
    wide = 64 if cut.plan.way == "whole" else 128  # 196 values of 2 bytes: rows begin at multiples of 8 bytes
    for program, constants in programs_of(cut).items():
        is_backward = hasattr(backward, program)
        module, one = (backward, cut.backward) if is_backward else (forward, cut)
        found = machine(getattr(module, program), one, target, **constants)
        assert found.stack == 0, program
        assert found.loads[16] == found.loads[8] == 0, program
        assert found.registers <= MOST_REGISTERS[program], program
        assert found.loads[wide] + found.asynchronous[wide] > 0, program
        assert found.shared <= 48 * 1024, program
        if not target.startswith("gfx") and program not in ("apply", "apply_gradient", "in_registers"):
            assert set(found.asynchronous) == {wide}, program


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("side", [(64, 16), (256, 4)], ids=str)
def test_what_is_computed_for_each_channel(target, side):
    sides = dict(zip(("BP", "BC"), side, strict=True)) | {"FLAT": False}
    for program, constants in (
        (forward.finish, {"UNBIASED": True, "SKIP": True}),
        (backward.finish_gradient_sums, {}),
        (channels.update, {"UNBIASED": True, "SKIP": True, "BC": 1024}),
        (channels.prepare, {"VARIANCE": True, "BC": 128}),
    ):
        others = {"sums": "*fp64"} if program is backward.finish_gradient_sums else {}
        if side == (256, 4):  # a model whose parameters and buffers are of half precision
            others |= dict.fromkeys(("weight", "bias", "dweight", "dbias", "running_mean", "running_var"), "*bf16")
        others |= {"m2": "*fp64", "finite": "*u8"} if program is channels.update else {}
        found = compiled(program, types(program, "bfloat16", **others), {**sides, **constants}, target, 4)
        assert found.stack == 0
        assert found.registers <= MOST_REGISTERS[program.fn.__name__]


@pytest.mark.parametrize("target", ["80", "90"])
def test_sums_of_columns_are_merged_without_a_stack(target):
    """Of 49 columns a channel, with one piece; their places are divisions, which take registers."""
    sides = {"BP": 64, "BC": 16, "FLAT": True}
    for program, constants in (
        (forward.finish, {"UNBIASED": True, "SKIP": True}),
        (backward.finish_gradient_sums, {}),
    ):
        others = {"sums": "*fp64"} if program is backward.finish_gradient_sums else {}
        found = compiled(program, types(program, "bfloat16", **others), {**sides, **constants}, target, 4)
        assert found.stack == 0


@pytest.mark.parametrize("activation", ["identity", "silu", "gelu", "gelu_tanh", "hardswish", "relu6", "leaky_relu"])
def test_every_activation_compiles(activation):
    cut = cut_of("interleaved", "bfloat16")
    assert machine(forward.apply, cut, "90", ACTIVATION=activation).stack == 0
    constants = {"ACTIVATION": activation, "FROM_OUTPUT": False}
    assert machine(backward.partial_gradient_sums, cut.backward, "90", **constants).registers <= 168


def test_a_program_that_is_too_large_would_show():
    """A tile of 32768 values does not fit 255 registers."""
    cut = cut_of("interleaved", "float32")
    huge = Cut(cut.plan, cut.shape, 1024, 32)
    assert machine(forward.partial_sums, huge, "90").stack > 0


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_sees_the_programs():
    """`triton_op`: an operator is its launches, in a graph that has no values."""
    with FakeTensorMode():
        x = torch.empty(64, 64, 56, 56, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight = torch.empty(64, device="cuda")
        rstd = torch.empty(64, device="cuda", dtype=torch.float64)

    def there(x: torch.Tensor, weight: torch.Tensor, _: torch.Tensor) -> Any:
        return operators.forward(x, weight, weight, None, None, 1e-5, "relu", 0.0)

    def back(x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> Any:
        return operators.reduce_grad(x, x, rstd, rstd, weight, weight, None, None, "relu", 0.0, False)

    for call, launches in ((there, 3), (back, 2)):
        graph = make_fx(dispatch_functionalize(call), tracing_mode="fake")(x, weight, rstd).graph
        names = [str(node.target) for node in graph.nodes]
        assert names.count("triton_kernel_wrapper_functional") == launches
        assert not any("gpu_" in name for name in names)
