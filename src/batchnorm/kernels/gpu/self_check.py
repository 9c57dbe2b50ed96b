"""The self-checks: a small tensor, cut like the real one, against torch's operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels import eager
from batchnorm.kernels.activation import Activation
from batchnorm.kernels.contract import Epilogue, Normalized, Running, Update
from batchnorm.kernels.gpu import fallback, memory
from batchnorm.kernels.gpu.plans import DTYPES, Cut, Shape, cut_by
from batchnorm.moments import Moments

# Largest difference of two results over the largest result, in units of the dtype's eps: torch's operators round more often.
TOLERANCE = 4.0
FLOAT32 = 1e-4  # of sums and statistics
EPS = 1e-5


def check(cut: Cut, device: torch.device) -> str | None:
    """What is wrong with the results of the fused pairs of this plan, or None. Waits for the device."""
    return _without_disturbing(device, lambda: _compare(small(cut), device))


def check_verbs(cut: Cut, device: torch.device) -> str | None:
    """The same of its verbs, which are launches of their own."""
    return _without_disturbing(device, lambda: _compare_verbs(small(cut), device))


def check_update(device: torch.device) -> str | None:
    """The same of the program that updates running statistics."""
    return _without_disturbing(device, lambda: _compare_update(device))


@torch.no_grad()
def _without_disturbing(device: torch.device, compare: Callable[[], str | None]) -> str | None:
    """Compare with poisoned outputs; may wait for the device even where the user forbids it."""
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    try:
        with memory.poisoned():
            return compare()
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
    found = cut_by(plan, replace(shape, rows=rows, channels=channels, positions=positions))
    return Cut(plan, found.shape, cut.height, cut.width)


def _few(size: int, width: int) -> int:
    """At most two tiles, the last one as full as that of the real size."""
    return size if size <= 2 * width else width + (size % width or width)


class _Operands(NamedTuple):
    x: Tensor
    dy: Tensor
    fused: Epilogue
    masked: Epilogue


def _operands(shape: Shape, device: torch.device) -> _Operands:
    x, residual, dy = (_values(shape, seed, device) for seed in (1, 2, 3))
    weight, bias = (_uniform(shape.channels, seed, device) + 0.5 for seed in (4, 5))
    values = math.prod(x.shape) // shape.channels
    mask = _uniform(values, 6, device).view(x.shape[0], 1, *x.shape[2:]) > 0.25
    return _Operands(
        x, dy, Epilogue(weight, bias, residual, None, Activation("relu")), Epilogue(weight, bias, None, mask)
    )


def _compare(cut: Cut, device: torch.device) -> str | None:
    from batchnorm.kernels.gpu import launches

    shape, C, eps = cut.shape, cut.shape.channels, EPS
    x, dy, *epilogues = _operands(shape, device)
    for epilogue in epilogues:
        y, statistics = memory.like(x), memory.empty(x, 3 * C + 1, dtype=torch.float64)
        expected = fallback.forward(x, eps, epilogue)
        running, updated = _running(C, device), _running(C, device)
        with launches.on(x):
            given = launches.operands(x, epilogue, cut)
            launches.train(x, y, statistics, given, eps, None if epilogue.mask is not None else (running, Update()))()
        rows, m2, count = launches.Statistics.of(statistics)
        pairs = [("y", y, expected.output), ("mean", rows[0], expected.moments.mean), ("M2", m2, expected.moments.m2)]
        if epilogue.mask is None:
            eager.update_running(updated, expected.moments, Update())
            pairs += _of_running(running, updated)
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
        if (problem := _first_difference(pairs)) is not None:
            return problem
    return None


def _compare_verbs(cut: Cut, device: torch.device) -> str | None:
    from batchnorm.kernels.gpu import launches

    C = cut.shape.channels
    x, dy, *epilogues = _operands(cut.shape, device)
    for epilogue in epilogues:
        statistics, y = memory.empty(x, 3 * C + 1, dtype=torch.float64), memory.like(x)
        sums, dx = memory.empty(x, 2, C, dtype=torch.float64), memory.like(x)
        expected = fallback.moments(x, epilogue.mask)
        mean, variance, rstd = expected.mean, expected.variance(), expected.rstd(EPS)
        by = mean.contiguous(), rstd.contiguous()
        grads = fallback.reduce_grad(dy, x, mean, rstd, epilogue)
        means = grads[0] / expected.count, grads[1] / expected.count
        dresidual = memory.like(x) if epilogue.has_residual else None
        with launches.on(x):
            given = launches.operands(x, epilogue, cut)
            launches.moments(x, statistics, given)
            rows = launches.normalize(x, y, given, mean, variance, EPS)
            launches.gradient_sums(dy, x, sums, given, by, launches.Wanted())
            launches.input_grad(dy, x, given, by, launches.Means(*means), launches.Wanted(dx, dresidual))
        found, m2, _ = launches.Statistics.of(statistics)
        pairs = [("mean", found[0], mean), ("M2", m2, expected.m2), ("rstd", rows[1], rstd)]
        pairs += [("y", y, fallback.normalize(x, mean, rstd, epilogue))]
        pairs += [("the sum of gradients", sums[0], grads[0]), ("the sum of products", sums[1], grads[1])]
        of_input, of_residual = fallback.input_grad(dy, x, mean, rstd, epilogue, means)
        pairs += [("dx", dx, of_input)] + ([] if dresidual is None else [("dresidual", dresidual, of_residual)])
        if (problem := _first_difference(pairs)) is not None:
            return problem
    return None


def _compare_update(device: torch.device) -> str | None:
    from batchnorm.kernels.gpu import launches

    C, update = 1500, Update(skip_nonfinite=True)  # two turns of its loop
    mean, m2 = (_uniform(C, seed, device).double() for seed in (1, 2))
    running, updated = _running(C, device), _running(C, device)
    finite = launches.update_running(running, mean, m2, 7, update)
    eager.update_running(updated, Moments(7, mean, m2), update)
    assert finite is not None, "it was asked for"
    return _first_difference(
        [
            *_of_running(running, updated),
            ("whether they are finite", finite.float(), finite.new_ones((), dtype=torch.float32)),
        ]
    )


def _running(C: int, device: torch.device) -> Running:
    return Running(_uniform(C, 4, device) + 0.5, _uniform(C, 5, device) + 0.5)


def _of_running(found: Running, expected: Running) -> list[tuple[str, Tensor, Tensor | None]]:
    return [
        ("the running mean", found.mean, expected.mean),
        ("the running variance", found.variance, expected.variance),
    ]


def _first_difference(pairs: Iterable[tuple[str, Tensor, Tensor | None]]) -> str | None:
    return next((problem for pair in pairs if (problem := _difference(*pair)) is not None), None)


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
    if shape.positions > 1:
        return values.view(shape.rows, shape.channels, shape.positions)
    return values.view(shape.rows, shape.channels)


def _uniform(number: int, seed: int, device: torch.device) -> Tensor:
    """Numbers spread over [0, 1), float32, that leave the user's random state alone."""
    steps = torch.arange(number, dtype=torch.float64, device=device)
    return ((steps + seed * 0.37) * 0.6180339887498949 % 1.0).float()
