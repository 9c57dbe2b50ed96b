"""Which calls the programs compute: those that a plan fits, on a device on which its programs do what they should."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from batchnorm.kernels.contract import Epilogue
from batchnorm.kernels.gpu import plans, self_check, trust
from batchnorm.kernels.gpu.plans import Cut
from batchnorm.torch_state import constant_while_compiling, is_fake

Result = TypeVar("Result")

SWITCH = "BATCHNORM_GPU"
DEVICES = ("cuda",)  # which ROCm calls its devices too
MOST_SHAPES = 4096  # whose cuts are remembered

# For shape, strides and dtype: the cut, or why there is none, and why torch's operators come first, or None.
_cuts: dict[tuple[torch.Size, tuple[int, ...], torch.dtype], tuple[Cut | str, str | None]] = {}


@cache
def unavailable() -> str | None:
    """Why these kernels cannot be used in this process, or None if they can."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH}=off"
    least = os.environ.get(plans.LEAST, "0")
    if not least.isdecimal():
        return f"{plans.LEAST} must be a number of bytes, but is {least!r}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def status() -> str:
    problem = unavailable()
    if problem is not None:
        return problem
    if "cuda" in DEVICES and not torch.cuda.is_available():
        return "Triton is installed, but there is no GPU"
    return "; ".join([f"Triton, {sum(plan.way != 'none' for plan in plans.table())} plans", *trust.failures()])


def refuses(x: Tensor, epilogue: Epilogue, plain: bool = True) -> str | None:
    if x.device.type not in DEVICES:
        return f"x is on {x.device.type}"
    if (elsewhere := epilogue.elsewhere(x)) is not None:
        return elsewhere
    if epilogue.sample_weights is not None:
        return "there are sample weights"
    for beside in (epilogue.residual, epilogue.output):
        if beside is not None and beside.dtype is not x.dtype:
            return f"the residual is {beside.dtype} and x is {x.dtype}"
    accepted_by_torch = plain and epilogue.mask is None
    reason = _reason_in_compiled_code(x, plain) if torch.compiler.is_compiling() else _reason(x, accepted_by_torch)
    return epilogue.wider_than(x) if reason is None else reason


def _reason(x: Tensor, accepted_by_torch: bool) -> str | None:
    problem = unavailable()
    if problem is not None:
        return problem
    if type(x) is not Tensor and not is_fake(x):
        return f"x is a {type(x).__name__}"
    if accepted_by_torch and (why := left_to_torch(x)) is not None:
        return why
    found = cut_of(x)
    return found if isinstance(found, str) else None


def _reason_in_compiled_code(x: Tensor, plain: bool) -> str | None:
    if not plain:
        return "the code is compiled, and the statistics are not those of the batch alone"
    if not _runs_in_compiled_code(tuple(x.shape), tuple(x.stride()), x.dtype, x.device):
        return "the code is compiled, and no plan for this shape ran before on the device"
    return None


def left_to_torch(x: Tensor) -> str | None:
    """Why torch's operators compute what they accept of x."""
    return _planned(x)[1]


def cut_of(x: Tensor) -> Cut | str:
    """How the programs cut x, or why they do not compute it."""
    found = _planned(x)[0]
    if isinstance(found, str) or is_fake(x):
        return found
    return trust.refusal(found.name, x.device, partial(self_check.check, found, x.device)) or found


def _planned(x: Tensor) -> tuple[Cut | str, str | None]:
    key = (x.shape, x.stride(), x.dtype)
    found = _cuts.get(key)
    if found is None:
        if len(_cuts) >= MOST_SHAPES:
            _cuts.clear()
        shape = plans.shape_of(x)
        no_plan = "x is not dense float32, bfloat16 or float16"
        found = (no_plan, None) if shape is None else (plans.cut(shape), plans.left_to_torch(shape))
        _cuts[key] = found
    return found


def attempt(x: Tensor, call: Callable[[Cut], Result], verb: bool = False) -> Result | None:
    """What the call returns, given the cut of x, on x's device; None where the programs do not compute it.

    The verbs are other launches than the pairs, and have a check of their own.
    """
    cut = cut_of(x)
    if isinstance(cut, str):
        return None
    name = cut.verbs if verb else cut.name
    if verb and trust.refusal(name, x.device, partial(self_check.check_verbs, cut, x.device)) is not None:
        return None

    def on_device() -> Result:
        with launch().on(x):
            return call(cut)

    return trust.attempt(name, x.device, on_device)


def is_traced(x: Tensor) -> bool:
    """Whether this call is recorded or has no values, so that it has to be one operator."""
    return torch.compiler.is_compiling() or is_fake(x)


def launch() -> ModuleType:
    """`gpu.launches`, which imports Triton."""
    from batchnorm.kernels.gpu import launches

    return launches


def operators() -> ModuleType:
    """`gpu.operators`, likewise."""
    from batchnorm.kernels.gpu import operators

    return operators


@constant_while_compiling
def _runs_in_compiled_code(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a plan for such a tensor ran on the device: a compiler cannot run the self-check."""
    found, _ = _cuts.get((torch.Size(shape), stride, dtype), (unavailable(), None))
    return (
        isinstance(found, Cut)
        and unavailable() is None
        and trust.known_good(found.name, str(device))
        and operators() is not None
    )
