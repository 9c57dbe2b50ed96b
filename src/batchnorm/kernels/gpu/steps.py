"""The steps: a layer's call in as few launches as there are, running statistics included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.activation import ROWS, Activation
from batchnorm.kernels.contract import Epilogue, Kernel, Normalized, Running, Step, Steps, Update, values_per_channel
from batchnorm.kernels.gpu import fallback, memory, trust
from batchnorm.kernels.gpu.dispatch import attempt, cut_of, launch
from batchnorm.kernels.gpu.plans import Cut

ACTIVATIONS = tuple(ROWS)  # numbered for `Step`


def steps_of(kernel: Kernel) -> Steps:
    """The steps, whose backward is `kernel` where it is differentiated again."""
    return Steps(
        Step(training, _backward(constant=False), False, code, kernel),
        Step(renormalization, _backward(constant=False), False, code, kernel),
        Step(inference, _backward(constant=True), True, code, kernel),
    )


def code(activation: Activation | None) -> tuple[int, float]:
    """The number and the slope of an activation."""
    return (-1, 0.0) if activation is None else (ACTIVATIONS.index(activation.name), activation.negative_slope)


def are_buffers(running: Running, x: Tensor, channels: int) -> bool:
    """Whether the programs can write these buffers of a layer: on x's device, without gaps."""
    values, counters = running[:2], running[2:]
    return all(
        value.device == x.device and value.shape == (channels,) and value.is_floating_point() and value.is_contiguous()
        for value in values
    ) and all(each is None or (each.device == x.device and each.dtype is torch.int64) for each in counters)


def training(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """`Kernel.forward` and `Kernel.update_running`; `arguments` are the buffers, the fields of `Update`, eps and the activation's code."""
    *buffers, momentum, unbiased, skip_nonfinite, eps, number, slope = arguments
    running, update = Running(*buffers), Update(momentum, unbiased, skip_nonfinite)
    epilogue, cut = _epilogue(x, weight, bias, residual, number, slope), cut_of(x)
    fits = are_buffers(running, x, x.shape[1]) and values_per_channel(x) > 1 and eps > 0.0
    if epilogue is None or isinstance(cut, str) or not fits:
        return _declined(x)

    def on_device(call: Callable[[], Any]) -> Any:
        with launch().on(x):
            return call()

    y, statistics = memory.like(x), memory.empty(x, 3 * x.shape[1] + 1, dtype=torch.float64)
    given = launch().operands(x, epilogue, cut)
    updated = trust.attempt(
        cut.name,
        x.device,
        lambda: on_device(lambda: launch().train(x, y, statistics, given, eps, (running, update))),
    )
    if updated is None:
        return _declined(x)
    rows = launch().Statistics.of(statistics).rows
    done = trust.attempt(cut.name, x.device, lambda: on_device(updated))
    if done is None:  # the running statistics are updated, so the general path must not do it again
        y = fallback.normalize(x, rows[0], rows[1], epilogue)
    return y, rows


def renormalization(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The general path takes every call."""
    return _declined(x)


def inference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """`Kernel.infer`; `arguments` are eps and the activation's code."""
    eps, number, slope = arguments
    epilogue = _epilogue(x, weight, bias, residual, number, slope)
    if epilogue is None or not are_buffers(Running(mean, variance), x, x.shape[1]) or not eps >= 0.0:
        return _declined(x)

    def call(cut: Cut) -> tuple[Tensor, Tensor]:
        y = memory.like(x)
        return y, launch().normalize(x, y, launch().operands(x, epilogue, cut), mean, variance, eps)

    return attempt(x, call, verb=True) or _declined(x)


def _backward(constant: bool) -> Callable[..., tuple[Tensor, ...]]:
    """dx, dweight and dbias in the parameters' dtype, and dresidual."""

    def backward(
        dy: Tensor,
        x: Tensor,
        statistics: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        beside: Tensor | None,
        *arguments: Any,
    ) -> tuple[Tensor, ...]:
        number, slope, is_output, wants_dresidual, wants_dx = arguments
        residual, output = (None, beside) if is_output else (beside, None)
        epilogue = Epilogue(weight, bias, residual, activation=_decoded(number, slope), output=output)
        count = None if constant else values_per_channel(x)
        nothing = x.new_empty(0)

        def call(cut: Cut) -> tuple[Tensor, ...]:
            dx, dresidual = (memory.like(x) if wanted else None for wanted in (wants_dx, wants_dresidual))
            dtype = torch.float32 if weight is None else weight.dtype
            dweight, dbias = memory.empty(x, 2, x.shape[1], dtype=dtype).unbind()
            sums = memory.empty(x, 2, x.shape[1], dtype=torch.float64)
            wanted = launch().Wanted(dx, dresidual, dweight, dbias)
            given, by = launch().operands(x, epilogue, cut), statistics.unbind()
            launch().backward(memory.laid_out_as(x, dy), x, sums, given, by, count, wanted)
            return nothing if dx is None else dx, dweight, dbias, nothing if dresidual is None else dresidual

        found = attempt(x, call)
        if found is not None:
            return found
        mean, rstd = statistics.unbind()
        by = Normalized(mean, rstd, count)
        dx, dresidual, sum_grad, sum_grad_xhat = fallback.backward(dy, x, by, epilogue, wants_dx)
        dtype = torch.float32 if weight is None else weight.dtype
        return (
            nothing if dx is None else dx,
            sum_grad_xhat.to(dtype),
            sum_grad.to(dtype),
            nothing if dresidual is None else dresidual,
        )

    return backward


def _epilogue(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, number: int, slope: float
) -> Epilogue | None:
    """The epilogue of a step; None if its parameters do not fit x."""
    for values in (weight, bias):
        if values is not None and not (
            values.device == x.device and values.shape == x.shape[1:2] and values.is_floating_point()
        ):
            return None
    epilogue = Epilogue(weight, bias, residual, activation=_decoded(number, slope))
    return epilogue if epilogue.wider_than(x) is None else None


def _decoded(number: int, slope: float) -> Activation | None:
    return None if number < 0 else Activation(ACTIVATIONS[number], slope)


def _declined(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0), x.new_empty(0)
