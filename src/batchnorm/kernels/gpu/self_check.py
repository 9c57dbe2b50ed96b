"""The self-check of a plan: a small tensor, cut like the real one, against torch's operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm.kernels.activation import Activation
from batchnorm.kernels.contract import Epilogue, Normalized, Running, Update
from batchnorm.kernels.gpu import fallback, memory
from batchnorm.kernels.gpu.plans import DTYPES, Cut, Shape, cut_by

# Largest difference of two results over the largest result, in units of the dtype's eps: torch's operators round more often.
TOLERANCE = 4.0
FLOAT32 = 1e-4  # of sums and statistics


@torch.no_grad()
def check(cut: Cut, device: torch.device) -> str | None:
    """What is wrong with the results of this plan's programs, or None. Waits for the device."""
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    try:
        with memory.poisoned():
            return _compare(small(cut), device)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(before)


def small(cut: Cut) -> Cut:
    """The plan on a shape of few tiles, some of them incomplete where the real ones are: Triton compiles the same programs for it."""
    shape, plan = cut.shape, cut.plan
    if plan.way == "in_registers":
        rows, positions = shape.rows, shape.positions
    else:
        rows, positions = min(shape.rows, 3 * cut.height + 1), _few(shape.positions, cut.width)
    channels = min(shape.channels, 5) if shape.planar else _few(shape.channels, cut.width)
    found = cut_by(plan, Shape(shape.dtype, shape.planar, rows, channels, positions))
    return Cut(plan, found.shape, cut.height, cut.width)


def _few(size: int, width: int) -> int:
    """At most two tiles, the last one as full as that of the real size."""
    return size if size <= 2 * width else width + (size % width or width)


def _compare(cut: Cut, device: torch.device) -> str | None:
    from batchnorm.kernels.gpu import launches

    shape = cut.shape
    x, residual, dy = (_values(shape, seed, device) for seed in (1, 2, 3))
    weight, bias = (_uniform(shape.channels, seed, device) + 0.5 for seed in (4, 5))
    C, eps = shape.channels, 1e-5
    mask = _uniform(math.prod(x.shape) // C, 6, device).view(x.shape[0], 1, *x.shape[2:]) > 0.25
    for epilogue in (Epilogue(weight, bias, residual, None, Activation("relu")), Epilogue(weight, bias, None, mask)):
        y, statistics = memory.like(x), memory.empty(x, 3 * C + 1, dtype=torch.float64)
        expected = fallback.forward(x, eps, epilogue)
        running, variance = Running(weight.clone(), bias.clone()), expected.moments.variance(unbiased=True)
        with launches.on(x):
            given = launches.operands(x, epilogue, cut)
            launches.train(x, y, statistics, given, eps, None if mask is epilogue.mask else (running, Update()))()
        rows, m2, count = launches.Statistics.of(statistics)
        pairs = [("y", y, expected.output), ("mean", rows[0], expected.moments.mean), ("M2", m2, expected.moments.m2)]
        if epilogue.mask is None:
            pairs += [("the running mean", running.mean, 0.9 * weight + 0.1 * expected.moments.mean)]
            pairs += [("the running variance", running.variance, 0.9 * bias + 0.1 * variance)]
        output = expected.output if epilogue.residual is not None else None
        known = epilogue._replace(residual=None, output=output)
        by = Normalized(rows[0], rows[1], shape.rows * shape.positions if epilogue.mask is None else count)
        grads = fallback.backward(dy, x, by, known, True)
        dx, dresidual = memory.like(x), None if output is None else memory.like(x)
        sums = memory.empty(x, 2, C, dtype=torch.float64)
        with launches.on(x):
            given = launches.operands(x, known, cut)
            launches.backward(dy, x, sums, given, (rows[0], rows[1]), by.count, launches.Wanted(dx, dresidual))
        pairs += [("dx", dx, grads.input), ("the sum of gradients", sums[0], grads.sum_grad)]
        pairs += [("the sum of products", sums[1], grads.sum_grad_xhat)]
        pairs += [] if dresidual is None else [("dresidual", dresidual, grads.residual)]
        for what, found, other in pairs:
            problem = _difference(what, found, other)
            if problem is not None:
                return problem
    return None


def _difference(what: str, found: Tensor, expected: Tensor | None) -> str | None:
    assert expected is not None, what
    narrow = found.dtype is not torch.float64
    tolerance = max(TOLERANCE * torch.finfo(found.dtype).eps, FLOAT32) if narrow else 100 * FLOAT32
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1.0)
    value = error.item()
    if value <= tolerance:  # false of NaN
        return None
    return f"its self-check found {what} off by {value:.2g} of the largest value, where {tolerance:.2g} is allowed"


def _values(shape: Shape, seed: int, device: torch.device) -> Tensor:
    """x of a shape, with mean 0.5 and values between -1.5 and 2.5."""
    values = (_uniform(shape.rows * shape.channels * shape.positions, seed, device) * 4 - 1.5).to(DTYPES[shape.dtype])
    if shape.planar:
        return values.view(shape.rows, shape.channels, shape.positions)
    return values.view(shape.rows, shape.channels)


def _uniform(number: int, seed: int, device: torch.device) -> Tensor:
    """Numbers spread over [0, 1), float32, that leave the user's random state alone."""
    steps = torch.arange(number, dtype=torch.float64, device=device)
    return ((steps + seed * 0.37) * 0.6180339887498949 % 1.0).float()
