"""Launches the programs. Importing this module imports Triton.

Each function here computes one verb or pair from its operands and the cut of x. None waits for the device, and none reads a value of it.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.contract import Epilogue, Running, Update
from batchnorm.kernels.gpu import memory
from batchnorm.kernels.gpu.plans import Cut
from batchnorm.kernels.gpu.programs import backward as backward_programs
from batchnorm.kernels.gpu.programs import channels as channel_programs
from batchnorm.kernels.gpu.programs import forward as forward_programs

Tensors = tuple[Tensor, Tensor]
Wrap = Callable[
    [Any], Any
]  # a program -> what is launched; `torch.library.wrap_triton` where a compiler records the launch


def directly(program: Any) -> Any:
    return program


class Given(NamedTuple):
    """The operands of a launch beside x.

    Attributes:
        cut: of x.
        wrap: as above.
        weight, bias: (C,) or None.
        beside: the residual or, in the backward, the output; or None.
        mask: bytes, (N, 1, *S), or None.
        activation: its name, or "identity".
        slope: of the activation.
        from_output: whether `beside` is the output.
    """

    cut: Cut
    wrap: Wrap
    weight: Tensor | None
    bias: Tensor | None
    beside: Tensor | None
    mask: Tensor | None
    activation: str
    slope: float
    from_output: bool

    @property
    def backward(self) -> Given:
        """The same, cut for the backward."""
        return self._replace(cut=self.cut.backward)

    @property
    def derivative(self) -> dict[str, Any]:
        return {"ACTIVATION": self.activation, "FROM_OUTPUT": self.from_output}


def operands(x: Tensor, epilogue: Epilogue, cut: Cut, wrap: Wrap = directly) -> Given:
    weight, bias, residual, mask, activation, output, _ = epilogue
    beside = residual if output is None else output
    return Given(
        cut,
        wrap,
        memory.flat(weight),
        memory.flat(bias),
        None if beside is None else memory.laid_out_as(x, beside),
        memory.whole_mask(mask, x),
        "identity" if activation is None else activation.name,
        0.0 if activation is None else activation.negative_slope,
        output is not None,
    )


class Statistics(NamedTuple):
    """The statistics of x: views of (3C + 1,) float64.

    Attributes:
        rows: mean and rstd, (2, C).
        m2: (C,).
        count: 0-d.
    """

    rows: Tensor
    m2: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride] (of a tuple's method)

    @staticmethod
    def of(values: Tensor) -> Statistics:
        C = values.shape[0] // 3
        return Statistics(values[: 2 * C].view(2, C), values[2 * C : 3 * C], values[3 * C])


def moments(x: Tensor, statistics: Tensor, given: Given) -> None:
    """Fills `statistics`; its rstd is of eps 1."""
    _finish(statistics, given, _partial_sums(x, given), 1.0)


def forward(x: Tensor, y: Tensor, statistics: Tensor, given: Given, eps: float) -> None:
    """Fills y and `statistics`, (3C + 1,)."""
    train(x, y, statistics, given, eps)()


def train(
    x: Tensor, y: Tensor, statistics: Tensor, given: Given, eps: float, updated: tuple[Running, Update] | None = None
) -> Callable[[], bool]:
    """Fills `statistics`, (3C + 1,), and updates the running ones; returns what fills y then, unless that is done already.

    The two are apart because an update must not happen twice, should the second fail.
    """
    way = given.cut.plan.way
    if way == "split":
        coefs = memory.empty(x, 5 * x.shape[1], dtype=torch.float32)
        _finish(statistics, given, _partial_sums(x, given), eps, coefs, updated)
        return lambda: _apply(x, y, given, coefs)
    operands = (x, given.beside, given.mask, y, statistics, given.weight, given.bias, *_halves(eps), given.slope)
    cut, grid = given.cut, (given.cut.blocks,)
    if way == "in_registers":
        given.wrap(forward_programs.in_registers)[grid](*operands, **cut.tile, ACTIVATION=given.activation)
    else:
        given.wrap(forward_programs.whole)[grid](*operands, **cut.channel, ACTIVATION=given.activation)
    if updated is not None:
        of_x, values = Statistics.of(statistics), given.cut.shape.rows * given.cut.shape.positions
        update_running(updated[0], of_x.rows[0], of_x.m2, values, updated[1])
    return lambda: True


def normalize(x: Tensor, y: Tensor, given: Given, mean: Tensor, spread: Tensor, eps: float | None = None) -> Tensor:
    """Fills y; returns mean and rstd, (2, C). `spread` is rstd, or the variance if there is an eps."""
    C = x.shape[1]
    statistics = memory.empty(x, 2, C, dtype=torch.float64)
    coefs = memory.empty(x, 5 * C, dtype=torch.float32)
    given.wrap(channel_programs.prepare)[(_ceil(C, 128),)](
        memory.flat(mean),
        memory.flat(spread),
        given.weight,
        given.bias,
        *_halves(eps or 0.0),
        statistics,
        coefs,
        C,
        VARIANCE=eps is not None,
        BC=128,
    )
    _apply(x, y, given, coefs)
    return statistics


class Means(NamedTuple):
    """Σg / count and Σg·x̂ / count, (C,); None of constant statistics.

    Attributes:
        grad, grad_xhat: the means, or the sums.
        are_sums: whether they are sums.
        count: their divisor, 0-d, or None for the number of values.
    """

    grad: Tensor | None = None
    grad_xhat: Tensor | None = None
    are_sums: bool = False
    count: Tensor | None = None  # pyright: ignore[reportIncompatibleMethodOverride] (likewise)


class Wanted(NamedTuple):
    """The tensors that a backward fills besides the sums, as far as they are wanted; those of weight and bias have their dtypes."""

    dx: Tensor | None = None
    dresidual: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


def gradient_sums(dy: Tensor, x: Tensor, sums: Tensor, given: Given, by: Tensors, wanted: Wanted) -> None:
    """Fills `sums`, Σg and Σg·x̂, (2, C), and dweight and dbias."""
    given, C = given.backward, x.shape[1]
    cut = given.cut
    partial = memory.empty(x, 2 * cut.sums, dtype=torch.float32)
    given.wrap(backward_programs.partial_gradient_sums)[cut.grid](
        dy,
        x,
        given.beside,
        given.mask,
        *by,
        given.weight,
        given.bias,
        given.slope,
        partial,
        **cut.sum,
        **given.derivative,
    )
    side = _merging(cut)
    given.wrap(backward_programs.finish_gradient_sums)[(_ceil(C, side["BC"]),)](
        partial, sums, wanted.dweight, wanted.dbias, cut.pieces, C, cut.columns, **side
    )


def input_grad(dy: Tensor, x: Tensor, given: Given, by: Tensors, means: Means, wanted: Wanted) -> None:
    """Fills dx and dresidual."""
    given = given.backward
    given.wrap(backward_programs.apply_gradient)[given.cut.grid](
        dy,
        x,
        given.beside,
        given.mask,
        wanted.dx,
        wanted.dresidual,
        *by,
        memory.flat(means.grad),
        memory.flat(means.grad_xhat),
        means.count,
        given.weight,
        given.bias,
        given.slope,
        **given.cut.map,
        **given.derivative,
        CONSTANT=means.grad is None,
        OVER_COUNT=means.are_sums,
    )


def backward(
    dy: Tensor, x: Tensor, sums: Tensor, given: Given, by: Tensors, count: int | Tensor | None, wanted: Wanted
) -> None:
    """Fills `sums` and what is wanted. The count is None of constant statistics, and else a tensor, or all values of a channel."""
    backward = given.backward
    nothing = wanted.dx is None and wanted.dresidual is None
    divisor = count if isinstance(count, Tensor) else None
    if given.cut.plan.way == "split" or nothing:
        gradient_sums(dy, x, sums, given, by, wanted)
        if not nothing:
            means = Means() if count is None else Means(sums[0], sums[1], True, divisor)
            input_grad(dy, x, given, by, means, wanted)
        return
    backward.wrap(backward_programs.whole_gradient)[(backward.cut.blocks,)](
        dy,
        x,
        backward.beside,
        backward.mask,
        wanted.dx,
        wanted.dresidual,
        *by,
        divisor,
        backward.weight,
        backward.bias,
        backward.slope,
        sums,
        wanted.dweight,
        wanted.dbias,
        **backward.cut.channel,
        **backward.derivative,
        CONSTANT=count is None,
    )


def update_running(running: Running, mean: Tensor, m2: Tensor, count: int | Tensor, update: Update) -> Tensor | None:
    """Updates the running statistics; 0-d bool, whether those of the batch are finite, or None without `skip_nonfinite`."""
    finite = memory.empty(mean, dtype=torch.uint8) if update.skip_nonfinite else None
    assert isinstance(update.momentum, float), "`takes_update` was asked"
    with on(mean):
        directly(channel_programs.update)[(1,)](
            mean,
            m2,
            count if isinstance(count, Tensor) else None,
            0 if isinstance(count, Tensor) else count,
            *running,
            *_halves(update.momentum),
            finite,
            mean.shape[0],
            UNBIASED=update.unbiased,
            SKIP=update.skip_nonfinite,
            BC=min(1024, _power_of_two(mean.shape[0])),
        )
    return None if finite is None else finite.view(torch.bool)


def on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the current device, which may be another one than x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _partial_sums(x: Tensor, given: Given) -> tuple[Tensor, Tensor]:
    sums = memory.empty(x, 4 * given.cut.sums, dtype=torch.float32)
    arrivals = memory.empty(x, 1, dtype=torch.int32)
    given.wrap(forward_programs.partial_sums)[given.cut.grid](x, given.mask, sums, arrivals, **given.cut.sum)
    return sums, arrivals


def _finish(
    statistics: Tensor,
    given: Given,
    sums: tuple[Tensor, Tensor],
    eps: float,
    coefs: Tensor | None = None,
    updated: tuple[Running, Update] | None = None,
) -> None:
    cut, C = given.cut, given.cut.shape.channels
    running, update = (None, Update()) if updated is None else updated
    assert isinstance(update.momentum, float), "`steps_for` was asked"
    side = _merging(cut)
    given.wrap(forward_programs.finish)[(_ceil(C, side["BC"]),)](
        *sums,
        statistics,
        coefs,
        given.weight,
        given.bias,
        *_halves(eps),
        *(running or (None,) * 4),
        *_halves(update.momentum),
        cut.pieces,
        C,
        cut.columns,
        **side,
        UNBIASED=update.unbiased,
        SKIP=update.skip_nonfinite,
    )


def _apply(x: Tensor, y: Tensor, given: Given, coefs: Tensor) -> bool:
    given.wrap(forward_programs.apply)[given.cut.grid](
        x,
        given.beside,
        given.mask,
        y,
        coefs,
        given.slope,
        **given.cut.map,
        ACTIVATION=given.activation,
    )
    return True


def _merging(cut: Cut) -> dict[str, int]:
    """Sums of a channel, and channels, that a program merges at once: 1024 values, so that many sums take few trips to memory."""
    side = {"BP": 64, "BC": 16} if cut.pieces * cut.columns <= 64 else {"BP": 256, "BC": 4}
    return {**side, "FLAT": cut.shape.flat}


@lru_cache(256)
def _halves(value: float) -> tuple[float, float]:
    """The number as the sum of two float32, which is how Triton passes a float."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def _ceil(size: int, by: int) -> int:
    return -(-size // by)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
