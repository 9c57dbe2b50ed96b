"""The fast path of a layer's call: one operator forward, one backward, and as few Python frames around them as possible.

On a tensor of a few kilobytes the frames are most of what a layer costs. Calls with anything unusual take the general path, with the
same bits as the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels, memory
from batchnorm.functional.autograd import gradients
from batchnorm.functional.recompute import recomputing
from batchnorm.kernels import Activation, Correction, Epilogue, Step, Steps
from batchnorm.kernels.contract import values_per_channel
from batchnorm.torch_state import differentiated_by_torch, is_tracing


def steps_for(x: Tensor, running_mean: Tensor) -> Steps | None:
    """The one-operator calls for x, or None if this call takes the general path."""
    if (
        type(x) is not Tensor
        or torch.compiler.is_compiling()
        or is_tracing()
        or differentiated_by_torch()
        or memory.saving()
    ):
        return None
    return kernels.steps_for(x, running_mean)


def call(
    steps: Steps,
    step: Step,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: Activation | None,
    eps: float,
    running: tuple[Any, ...],
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor | None:
    """y, or None if the operator does not take the call; then nothing was written.

    Args:
        steps: of `steps_for`.
        step: one of them.
        x: (N, C, *S).
        weight: gamma, (C,).
        bias: beta, (C,).
        activation: applied last.
        eps: added to the variance.
        running: the layer's buffers and how a batch updates them, in the order of the operator's schema.
        observe: receives the batch's statistics if no gradient is recorded.
    """
    if recomputing():
        # A checkpoint expects the same tensors to be saved, so the recomputation takes the same path, on copies of the buffers.
        running = tuple(value.clone() if isinstance(value, Tensor) else value for value in running)
    rest = (*running, eps, *steps.activation_code(activation))
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, bias, (steps, step, eps, activation, rest))
    y, statistics = step.forward(x, weight, bias, *rest)
    if not y.numel():
        return None
    if observe is not None:
        observe(statistics)
    return y


class NormalizeAtOnce(torch.autograd.Function):
    """The autograd node of the fast path; it returns None if the operator does not take the call."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        constants: tuple[
            Steps, Step, float, Activation | None, tuple[Any, ...]
        ],  # as one: autograd looks at each argument
    ) -> Tensor | None:
        steps, step, eps, activation, rest = constants
        y, statistics = step.forward(x, weight, bias, *rest)
        if not y.numel():
            return None
        ctx.materialize_grads = False
        ctx.steps, ctx.step, ctx.kernel, ctx.eps, ctx.activation = steps, step, steps.kernel, eps, activation
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
            code = ctx.steps.activation_code(ctx.activation)
            dx, dweight, dbias = ctx.step.backward(dy, x, statistics, weight, bias, *code, wants_dx)
        dx, dweight = dx if wants_dx else None, dweight if wants_dweight else None
        return dx, dweight, dbias if wants_dbias else None, None


# `NormalizeAtOnce.apply` without its two frames for `torch.func`, which takes the general path: they cost as much as a kernel.
_apply = super(torch.autograd.Function, NormalizeAtOnce).apply  # pyright: ignore[reportAttributeAccessIssue]
