"""The one autograd node over the kernels' verbs, and which calls go another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels, memory
from batchnorm.functional import reduction
from batchnorm.functional.reduction import Reducer
from batchnorm.kernels import Activation, Correction, Epilogue, Groups, Renormalization, eager
from batchnorm.moments import Moments
from batchnorm.torch_state import differentiated_by_torch


def exporting() -> bool:
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def needs_grad(input: Tensor, epilogue: Epilogue) -> bool:
    if not torch.is_grad_enabled():
        return False
    weight, bias, residual = epilogue.weight, epilogue.bias, epilogue.residual
    return (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def distinct(input: Tensor, epilogue: Epilogue) -> tuple[Any, ...]:
    """The epilogue's fields as `Normalize` takes them; while compiling no tensor comes twice, which Dynamo cannot trace."""
    fields = [epilogue.weight, epilogue.bias, epilogue.residual, epilogue.mask, epilogue.activation]
    if torch.compiler.is_compiling():
        seen = [input]
        for i, value in enumerate(fields[:3]):
            if isinstance(value, Tensor):
                fields[i] = value.view_as(value) if any(value is other for other in seen) else value
                seen.append(value)
    return tuple(fields)


class Normalize(torch.autograd.Function):
    """The one autograd node: running statistics given are constants; None means the batch's own, which may be known already.

    Beside the bounds r_max and d_max it is the batch's own too, corrected toward the running statistics.
    """

    @staticmethod
    def forward(  # the epilogue's fields come one by one: autograd only sees tensors that are arguments themselves
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: Activation | None,
        reducer: Reducer | None,
        groups: Groups | None = None,
        known_count: int | Tensor | None = None,
        known_mean: Tensor | None = None,
        known_m2: Tensor | None = None,
        r_max: Tensor | None = None,
        d_max: Tensor | None = None,
    ) -> tuple[Tensor, int | Tensor | None, Tensor | None, Tensor | None]:
        epilogue = Epilogue(weight, bias, residual, mask, activation)
        kernel = kernels.select(x, epilogue)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept_bias = None if activation is None else bias  # without an activation no gradient depends on it
        ctx.kernel, ctx.eps, ctx.activation = kernel, eps, activation
        ctx.reducer, ctx.groups = reducer, groups
        renormalization = None
        if running_mean is not None and running_var is not None and r_max is not None and d_max is not None:
            renormalization = Renormalization(running_mean, running_var, r_max, d_max)
        elif running_mean is not None and running_var is not None:
            ctx.count = None
            y, mean, rstd = kernel.infer(x, running_mean, running_var, eps, epilogue)
            _remember(y, x, epilogue, lambda x, given: kernel.normalize(x, mean, rstd, given))
            ctx.save_for_backward(x, mean, rstd, weight, kept_bias, *kept_of_residual(epilogue, y), mask, *[None] * 3)
            return y, None, None, None
        known = None
        if known_count is not None and known_mean is not None and known_m2 is not None:
            known = Moments(
                known_count, known_mean.view_as(known_mean), known_m2.view_as(known_m2)
            )  # outputs: not the inputs
        y, moments, rstd, correction = reduction.forward(
            kernel, x, eps, epilogue, reducer, groups, known, renormalization
        )
        masked_count = moments.count if isinstance(moments.count, Tensor) else None
        ctx.count = None if masked_count is not None else moments.count
        kept = kept_of_residual(epilogue, y)
        if reducer is None and known is None:
            if memory.recording() is not None and renormalization is not None:
                renormalization = renormalization.copy()
            _remember(
                y,
                x,
                epilogue,
                lambda x, given: reduction.forward(kernel, x, eps, given, None, groups, None, renormalization)[0],
            )
        else:
            _remember(
                y, x, epilogue, lambda x, given: kernel.normalize(x, moments.mean, rstd, given.corrected(correction))
            )
        r_and_d = correction or (None, None)
        ctx.save_for_backward(x, moments.mean, rstd, weight, kept_bias, *kept, mask, masked_count, *r_and_d)
        ctx.mark_non_differentiable(*(value for value in moments if isinstance(value, Tensor)))
        return y, moments.count, moments.mean, moments.m2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]  # the moments are not differentiable
        if dy is None:
            return (None,) * 16
        x, mean, rstd, weight, bias, residual, output, mask, masked_count, r, d = ctx.saved_tensors
        epilogue = Epilogue(weight, bias, residual, mask, ctx.activation, output)
        count = ctx.count if masked_count is None else masked_count
        correction = None if r is None else Correction(r, d)
        dx, dweight, dbias, dresidual = gradients(
            ctx, dy, x, mean, rstd, epilogue, count, ctx.needs_input_grad[5], correction
        )
        if ctx.activation is None and ctx.needs_input_grad[6]:
            dresidual = counted(dy, mask)
        return dx, None, None, None, dweight, dbias, dresidual, *(None,) * 9


def _remember(y: Tensor, x: Tensor, epilogue: Epilogue, again: Callable[[Tensor, Epilogue], Tensor]) -> None:
    """Where memory is saved, tell how y is computed again: by the call that computed it, so that not a bit differs.

    Weight and bias are copied: they are small, and may move, or be given back by those who shard them, before the backward.
    """
    saver = memory.recording()
    if saver is None:
        return
    weight, bias = (None if value is None else value.detach().clone() for value in epilogue[:2])
    activation = epilogue.activation
    saver.remember(
        y,
        lambda x, residual, mask: again(x, Epilogue(weight, bias, residual, mask, activation)),
        x,
        epilogue.residual,
        epilogue.mask,
    )


def gradients(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    count: int | Tensor | None,
    wants_dbias: bool,
    correction: Correction | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual, from the node's kernel or such that can be differentiated again.

    `count` is None where the statistics are constants. Of its node it takes `kernel`, `eps`, `bias_dtype`, `reducer` and `groups`.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        given = (mean, rstd) if count is None else None
        dx, dweight, dbias, dresidual = _differentiable_backward(
            dy, x, given, ctx.eps, epilogue, ctx.reducer, ctx.groups, correction
        )
        if epilogue.activation is None and wants_dbias:
            dbias = counted(dy, epilogue.mask).sum([0, *range(2, dy.dim())], dtype=mean.dtype).to(ctx.bias_dtype)
        return dx, dweight, dbias, dresidual
    kernel = eager if differentiated_by_torch() else ctx.kernel  # vmap over dy: a batch of gradients at once
    dx, dresidual, sum_grad, sum_grad_xhat = reduction.backward(
        kernel,
        dy,
        x,
        mean,
        rstd,
        epilogue.corrected(correction),
        count,
        ctx.needs_input_grad[0],
        ctx.reducer,
        ctx.groups,
    )
    if correction is not None:
        sum_grad_xhat = correction.weight_grad(sum_grad, sum_grad_xhat)
    if ctx.groups is not None:  # each (G, C)
        sum_grad, sum_grad_xhat = sum_grad.sum(0), sum_grad_xhat.sum(0)
    dweight = None if epilogue.weight is None else sum_grad_xhat.to(epilogue.weight.dtype)
    dbias = None if ctx.bias_dtype is None else sum_grad.to(ctx.bias_dtype)
    return dx, dweight, dbias, dresidual


def counted(dy: Tensor, mask: Tensor | None) -> Tensor:
    return dy if mask is None else torch.where(mask, dy, 0)


def kept_of_residual(epilogue: Epilogue, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the backward needs of the residual, as `Epilogue.residual` and `Epilogue.output`; without an activation nothing."""
    if epilogue.residual is None or epilogue.activation is None:
        return None, None
    from_output = epilogue.activation.derivative_from_output and epilogue.residual.dtype == y.dtype
    return (None, y) if from_output else (epilogue.residual, None)


def _differentiable_backward(
    dy: Tensor,
    x: Tensor,
    given: tuple[Tensor, Tensor] | None,
    eps: float,
    epilogue: Epilogue,
    reducer: Reducer | None,
    groups: Groups | None,
    correction: Correction | None,
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and residual that can be differentiated again, to any order.

    Each input is taken by a fresh alias: where weight was itself computed from x, the gradient of x must not run through weight.
    An activation whose derivative is read off y is made of straight lines: there the derivative is a constant.
    """
    x = x.view_as(x)
    weight, bias, residual = (None if value is None else value.view_as(value) for value in epilogue[:3])
    inputs = (x, weight, bias, residual)
    activation, output, mask = epilogue.activation, epilogue.output, epilogue.mask
    if activation is not None and output is not None:
        dy = dy * activation.derivative(output.detach())
        activation = None
    epilogue = Epilogue(weight, bias, residual, mask, activation).corrected(correction)
    y = (
        reduction.forward(eager, x, eps, epilogue, reducer, groups)[0]
        if given is None
        else eager.normalize(x, *given, epilogue)
    )
    wanted = [value for value in inputs if value is not None and value.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True)) if wanted else iter(())
    dx, dweight, dbias, dresidual = (
        next(grads) if value is not None and value.requires_grad else None for value in inputs
    )
    if output is not None:
        dresidual = counted(dy, mask)
    return [dx, dweight, dbias, dresidual]
