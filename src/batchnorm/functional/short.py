"""The short way of a layer's training step: one operator forward, one backward, and as few frames around them as there can be.

On a tensor of a few kilobytes the frames are what a layer costs. What is not of the usual kind goes the long way, to the same bits.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from batchnorm import kernels, memory
from batchnorm.functional.autograd import differentiated_by_torch, gradients
from batchnorm.functional.recompute import recomputing
from batchnorm.kernels import Activation, Epilogue, cpu
from batchnorm.kernels.contract import values_per_channel

Buffers = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def training_step(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Buffers,
    momentum: float,
    unbiased: bool,
    skip_nonfinite: bool,
    eps: float,
    activation: Activation | None,
) -> Tensor | None:
    """`normalize` and `move_running_statistics` at once: y, or None where this is not the way, and then nothing was touched.

    `running` is a layer's buffers: running_mean, running_var, num_batches_tracked, num_nonfinite_batches.
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
        running = cast("Buffers", tuple(None if buffer is None else buffer.clone() for buffer in running))
    rest = (*running, momentum, unbiased, skip_nonfinite, eps, *cpu.code(activation))
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, bias, (eps, activation, rest))
    y, _ = cpu.training_step(x, weight, bias, *rest)
    return y if y.numel() else None


class TrainingStep(torch.autograd.Function):
    """The autograd node of the short way; without an output where the operator does not take the call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: tuple[float, Activation | None, tuple[Any, ...]],  # as one: autograd looks at each argument
    ) -> Tensor | None:
        eps, activation, rest = constants
        y, statistics = cpu.training_step(x, weight, bias, *rest)
        if not y.numel():
            return None
        ctx.materialize_grads = False
        ctx.kernel, ctx.eps, ctx.activation, ctx.reducer, ctx.groups = cpu, eps, activation, None, None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, statistics, weight, None if activation is None else bias)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        if dy is None:
            return (None,) * 4
        x, statistics, weight, bias = ctx.saved_tensors
        wants_dx, wants_dweight, wants_dbias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or differentiated_by_torch() or torch.compiler.is_compiling():
            mean, rstd = statistics.unbind()
            epilogue, count = Epilogue(weight, bias, activation=ctx.activation), values_per_channel(x)
            dx, dweight, dbias, _ = gradients(ctx, dy, x, mean, rstd, epilogue, count, wants_dbias)
        else:
            code = cpu.code(ctx.activation)
            dx, dweight, dbias = cpu.training_step_backward(dy, x, statistics, weight, bias, *code, wants_dx)
        dx, dweight = dx if wants_dx else None, dweight if wants_dweight else None
        return dx, dweight, dbias if wants_dbias else None, None


# `TrainingStep.apply` without its two frames for `torch.func`, which takes the long way: they cost as much as a kernel.
_apply = super(torch.autograd.Function, TrainingStep).apply  # pyright: ignore[reportAttributeAccessIssue]
