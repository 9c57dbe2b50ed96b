"""The short way of a layer's call: one operator forward, one backward, and as few frames around them as there can be.

On a tensor of a few kilobytes the frames are what a layer costs. What is not of the usual kind goes the long way, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import kernels, memory
from batchnorm.functional.autograd import gradients
from batchnorm.functional.recompute import recomputing
from batchnorm.kernels import Activation, Correction, Epilogue, cpu
from batchnorm.kernels.contract import values_per_channel
from batchnorm.torch_state import differentiated_by_torch


class Step(NamedTuple):
    """The operators of a call and of its backward."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    constant_statistics: bool


# `normalize` and `move_running_statistics` at once; `normalize_with`.
TRAINING = Step(cpu.training_step, cpu.training_step_backward, False)
RENORMALIZATION = Step(cpu.renormalization_step, cpu.training_step_backward, False)
INFERENCE = Step(cpu.inference_step, cpu.inference_step_backward, True)


def take(
    step: Step,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    eps: float,
    running: tuple[Any, ...],
    seen: Callable[[Tensor], None] | None = None,
) -> Tensor | None:
    """y, or None where this is not the way, and then nothing was touched.

    `running` is what the operator takes of the layer's buffers and of how they follow a batch, in the order of its schema.
    `seen` is given the batch's statistics where no gradient is recorded.
    """
    if (
        type(x) is not Tensor
        or not x.is_cpu
        or not running[0].is_cpu
        or kernels.KERNELS[0] is not cpu
        or cpu.unavailable() is not None
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or differentiated_by_torch()
        or memory.saving()
    ):
        return None
    if recomputing():
        # A checkpoint wants the same tensors saved, so the same way is taken; it moves nothing that stays.
        running = tuple(value.clone() if isinstance(value, Tensor) else value for value in running)
    rest = (*running, eps, *cpu.code(activation))
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, bias, (step, eps, activation, rest))
    y, statistics = step.forward(x, weight, bias, *rest)
    if not y.numel():
        return None
    if seen is not None:
        seen(statistics)
    return y


class NormalizeShort(torch.autograd.Function):
    """The autograd node of the short way; without an output where the operator does not take the call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: tuple[Step, float, Activation | None, tuple[Any, ...]],  # as one: autograd looks at each argument
    ) -> Tensor | None:
        step, eps, activation, rest = constants
        y, statistics = step.forward(x, weight, bias, *rest)
        if not y.numel():
            return None
        ctx.materialize_grads = False
        ctx.step, ctx.kernel, ctx.eps, ctx.activation = step, cpu, eps, activation
        ctx.reducer, ctx.groups = None, None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, statistics, weight, None if activation is None else bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 4
        x, statistics, weight, bias = ctx.saved_tensors
        wants_dx, wants_dweight, wants_dbias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or differentiated_by_torch() or torch.compiler.is_compiling():
            mean, rstd, *r_and_d = statistics.unbind()
            correction = Correction(*r_and_d) if r_and_d else None
            epilogue = Epilogue(weight, bias, activation=ctx.activation)
            count = None if ctx.step.constant_statistics else values_per_channel(x)
            dx, dweight, dbias, _ = gradients(ctx, dy, x, mean, rstd, epilogue, count, wants_dbias, correction)
        else:
            code = cpu.code(ctx.activation)
            dx, dweight, dbias = ctx.step.backward(dy, x, statistics, weight, bias, *code, wants_dx)
        dx, dweight = dx if wants_dx else None, dweight if wants_dweight else None
        return dx, dweight, dbias if wants_dbias else None, None


# `NormalizeShort.apply` without its two frames for `torch.func`, which takes the long way: they cost as much as a kernel.
_apply = super(torch.autograd.Function, NormalizeShort).apply  # pyright: ignore[reportAttributeAccessIssue]
