"""The autograd node over the kernels, and whether a call needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import memory
from batchnorm.functional import reduction
from batchnorm.functional.checks import in_kernel_layout
from batchnorm.functional.reduction import Reducer
from batchnorm.kernels import Activation, Correction, Epilogue, Groups, Kernel, Normalized, Renormalization, Step, eager
from batchnorm.kernels.contract import values_per_channel
from batchnorm.moments import Moments
from batchnorm.torch_state import differentiated_by_torch, is_exporting, with_direct_backward


def exporting() -> bool:
    return is_exporting() or torch.jit.is_tracing()


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


def distinct(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """`others` as arguments of `Normalize`. While compiling, a tensor that comes twice is replaced by a view: Dynamo cannot trace it."""
    if not torch.compiler.is_compiling():
        return others
    earlier: list[Tensor] = [x]
    found: list[Tensor | None] = []
    for value in others:
        found.append(value.view_as(value) if value is not None and any(value is other for other in earlier) else value)
        if value is not None:
            earlier.append(value)
    return tuple(found)


class Call(NamedTuple):
    """The arguments of `Normalize` that need no gradient.

    Attributes:
        kernel: the kernel that accepts the call.
        eps: added to the variance.
        activation: applied last, or None.
        mask: bool, (N, 1, *S), or None.
        sample_weights: of the `Epilogue`.
        constants: the mean and variance to normalize x with, (C,) each; None for the statistics of the batch.
        known: the moments of the batch, if they were computed before.
        renormalization: the correction toward running statistics, or None.
        reducer: merges the moments with those of other replicas, or None.
        groups: groups of samples that are normalized separately, or None.
    """

    kernel: Kernel
    eps: float
    activation: Activation | None = None
    mask: Tensor | None = None
    sample_weights: Tensor | None = None
    constants: tuple[Tensor, Tensor] | None = None
    known: Moments | None = None
    renormalization: Renormalization | None = None
    reducer: Reducer | None = None
    groups: Groups | None = None


class StepCall(NamedTuple):
    """A call of `Normalize` that one operator computes.

    Attributes:
        step: the operator, and that of its backward.
        arguments: of the operator, after x, weight, bias and the residual.
        code: the activation as the operators take it.
        eps, activation: as in `Call`, for a backward that is itself differentiated.
    """

    step: Step
    arguments: tuple[Any, ...]
    code: tuple[int, float]
    eps: float
    activation: Activation | None

    reducer = groups = None


class Saved(NamedTuple):
    """The tensors that `Normalize` saves for backward, in this order; (C,) unless stated otherwise.

    Attributes:
        x: (N, C, *S); None if no gradient depends on it (`_depends_on_input`).
        mean, rstd: the statistics that x was normalized with.
        weight: or None.
        bias: or None, also without an activation, since no gradient depends on it then.
        residual, output: of the `Epilogue`.
        mask: of the call.
        sample_weights: of the call.
        counted: values per channel if only the device knows the number, 0-d or (G,), or None.
        r, d: of batch renormalization, or None.
        reserve: of the kernel's forward, or None.
    """

    x: Tensor | None
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    output: Tensor | None
    mask: Tensor | None
    sample_weights: Tensor | None = None
    counted: Tensor | None = None
    r: Tensor | None = None
    d: Tensor | None = None
    reserve: Tensor | None = None


@with_direct_backward
class Normalize(torch.autograd.Function):
    """The one autograd node. A `Call` returns y and the moments of its batch, which are not differentiable.

    A `StepCall` returns y, or None if the operator does not accept the call.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call | StepCall
    ) -> Any:
        ctx.call, ctx.bias_dtype = call, None if bias is None else bias.dtype
        if type(call) is StepCall:
            ctx.materialize_grads = False  # `set_materialize_grads` without its frame
            y, statistics = call.step.forward(x, weight, bias, residual, *call.arguments)
            if not y.numel():
                return None
            activation = call.activation
            # `save_for_backward`, likewise
            if call.step.constant_statistics and not _depends_on_input(ctx, activation, x, residual):
                ctx.to_save = (None, statistics, weight, None, None, None if activation is None else y)
            elif activation is None:
                ctx.to_save = (x, statistics, weight, None, None, None)
            elif residual is not None and activation.derivative_from_output:
                ctx.to_save = (x, statistics, weight, bias, None, y)
            else:
                ctx.to_save = (x, statistics, weight, bias, residual, None)
            return y
        assert type(call) is Call
        ctx.set_materialize_grads(False)
        weights = call.sample_weights
        epilogue = Epilogue(weight, bias, residual, call.mask, call.activation, None, weights)
        ctx.kernel = kernel = call.kernel
        bias = None if call.activation is None else bias
        if call.constants is not None:
            ctx.count = None
            y, mean, rstd = kernel.infer(x, *call.constants, call.eps, epilogue)
            if not _depends_on_input(ctx, call.activation, x, residual):
                output = None if call.activation is None else y
                ctx.save_for_backward(*Saved(None, mean, rstd, weight, None, None, output, call.mask))
                return y, None, None, None
            _record(y, x, epilogue, lambda x, given: kernel.normalize(x, mean, rstd, given))
            ctx.save_for_backward(*Saved(x, mean, rstd, weight, bias, *saved_of_residual(epilogue, y), call.mask))
            return y, None, None, None
        known, renormalization = call.known, call.renormalization
        if known is not None:  # outputs are not the inputs
            known = known._replace(mean=known.mean.view_as(known.mean), m2=known.m2.view_as(known.m2))
        y, moments, rstd, correction, reserve = reduction.forward(
            kernel, x, call.eps, epilogue, call.reducer, call.groups, known, renormalization
        )
        if call.reducer is None and known is None:
            if memory.recording() is not None and renormalization is not None:
                renormalization = renormalization.copy()

            def again(x: Tensor, given: Epilogue) -> Tensor:
                given = given._replace(sample_weights=weights)
                return reduction.forward(kernel, x, call.eps, given, None, call.groups, None, renormalization)[0]
        else:

            def again(x: Tensor, given: Epilogue) -> Tensor:
                return kernel.normalize(x, moments.mean, rstd, given.corrected(correction))

        _record(y, x, epilogue, again)
        count = moments.count if isinstance(moments.count, Tensor) else None
        ctx.count = None if count is not None else moments.count
        r, d = correction or (None, None)
        beside = saved_of_residual(epilogue, y)
        ctx.save_for_backward(
            *Saved(x, moments.mean, rstd, weight, bias, *beside, call.mask, weights, count, r, d, reserve)
        )
        ctx.mark_non_differentiable(*(value for value in moments if isinstance(value, Tensor)))
        return y, moments.count, moments.mean, moments.m2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = grads[0]  # the moments are not differentiable
        if dy is None:
            return (None,) * 5
        call = ctx.call
        if type(call) is StepCall:
            if not (torch.is_grad_enabled() or differentiated_by_torch() or torch.compiler.is_compiling()):
                wants_dx, wants_dweight, wants_dbias, wants_dresidual, _ = ctx.needs_input_grad
                x, statistics, weight, bias, residual, output = ctx.saved_tensors
                code, activation = call.code, call.activation
                if x is None:
                    x = dy = in_kernel_layout(before_activation(dy, activation, output))
                    code, activation, output = call.step.activation_code(None), None, None
                    assert code is not None, "every kernel has no activation"
                is_output, computes = output is not None, wants_dresidual and activation is not None
                beside = output if is_output else residual
                dx, dweight, dbias, computed = call.step.backward(
                    dy, x, statistics, weight, bias, beside, *code, is_output, computes, wants_dx
                )
                dx, dweight = dx if wants_dx else None, dweight if wants_dweight else None
                dresidual = computed if computes else dy  # without an activation they are the same
                return dx, dweight, dbias if wants_dbias else None, dresidual if wants_dresidual else None, None
            saved = _saved_of_step(*ctx.saved_tensors)
            ctx.kernel = call.step.kernel
            ctx.count = None if call.step.constant_statistics else values_per_channel(dy)
        else:
            saved = Saved(*ctx.saved_tensors)
        if saved.x is None:
            return *_gradients_without_input(ctx, dy, saved), None
        activation = call.activation
        beside = (saved.residual, saved.mask, activation, saved.output, saved.sample_weights)
        epilogue = Epilogue(saved.weight, saved.bias, *beside)
        count = ctx.count if saved.counted is None else saved.counted
        correction = None if saved.r is None or saved.d is None else Correction(saved.r, saved.d)
        by = Normalized(saved.mean, saved.rstd, count, saved.reserve)
        dx, dweight, dbias, dresidual = gradients(ctx, dy, saved.x, by, epilogue, ctx.needs_input_grad[2], correction)
        if activation is None and ctx.needs_input_grad[3]:
            dresidual = counted(dy, saved.mask)
        return dx, dweight, dbias, dresidual, None


def _saved_of_step(
    x: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
) -> Saved:
    """The saved tensors of a step in the form of the general path."""
    mean, rstd, *r_and_d = statistics.unbind()
    return Saved(x, mean, rstd, weight, bias, residual, output, None, None, None, *(r_and_d or (None, None)))


def _depends_on_input(ctx: Any, activation: Activation | None, x: Tensor, residual: Tensor | None) -> bool:
    """Whether a gradient depends on x if the statistics are constants: that of weight does, and an activation's may.

    Without them dx = weight · rstd · g, so x need not be saved. While compiling, the compiler finds this out. A slope times dy would be
    rounded to x's dtype, which the gradient of a wider bias or residual shows; then a kernel computes it, and needs x.
    """
    from_output = activation is None or activation.derivative_from_output
    _, _, wants_dbias, wants_dresidual, *_ = ctx.needs_input_grad
    wider_bias = wants_dbias and ctx.bias_dtype != x.dtype
    wider_residual = (
        wants_dresidual and residual is not None and torch.promote_types(residual.dtype, x.dtype) != x.dtype
    )
    rounded = activation is not None and activation.has_slope and (wider_bias or wider_residual)
    return ctx.needs_input_grad[1] or not from_output or rounded or torch.compiler.is_compiling()


def before_activation(dy: Tensor, activation: Activation | None, output: Tensor | None) -> Tensor:
    """g, the gradient before the activation, whose output was saved."""
    return dy if activation is None or output is None else dy * activation.derivative(output.detach())


def _gradients_without_input(ctx: Any, dy: Tensor, saved: Saved) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual of a call that did not save x. Kernels get g in its place; dx does not depend on it."""
    wants_dx, _, wants_dbias, wants_dresidual, *_ = ctx.needs_input_grad
    g = before_activation(dy, ctx.call.activation, saved.output)
    epilogue = Epilogue(saved.weight, mask=saved.mask)
    dx = dbias = None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if wants_dx:
            dx = eager.normalize(g, torch.zeros_like(saved.mean), saved.rstd, epilogue)
        if wants_dbias:
            dbias = counted(g, saved.mask).sum([0, *range(2, g.dim())], dtype=saved.mean.dtype).to(ctx.bias_dtype)
    else:
        kernel = eager if differentiated_by_torch() else ctx.kernel
        g, by = g if kernel is eager else in_kernel_layout(g), Normalized(saved.mean, saved.rstd, None)
        dx, _, sum_grad, _ = reduction.backward(kernel, g, g, by, epilogue, wants_dx, None)
        dbias = sum_grad.to(ctx.bias_dtype) if wants_dbias else None
    return dx, None, dbias, counted(g, saved.mask) if wants_dresidual else None


def _record(y: Tensor, x: Tensor, epilogue: Epilogue, again: Callable[[Tensor, Epilogue], Tensor]) -> None:
    """If memory is saved, record how to compute y again: by the same call, so the result is the same to the last bit.

    Weight and bias are copied: they are small, and may be updated, or freed by sharding, before the backward.
    """
    saver = memory.recording()
    if saver is None:
        return
    weight, bias = (None if value is None else value.detach().clone() for value in epilogue[:2])
    activation = epilogue.activation
    saver.record(
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
    by: Normalized,
    epilogue: Epilogue,
    wants_dbias: bool,
    correction: Correction | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and residual, by the node's kernel, or differentiable if grad mode is on.

    Of the node `ctx` it reads `call`, `kernel` and `bias_dtype`.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        given = (by.mean, by.rstd) if by.count is None else None
        dx, dweight, dbias, dresidual = _differentiable_backward(
            dy, x, given, ctx.call.eps, epilogue, ctx.call.reducer, ctx.call.groups, correction
        )
        if epilogue.activation is None and wants_dbias:
            dbias = counted(dy, epilogue.mask).sum([0, *range(2, dy.dim())], dtype=by.mean.dtype).to(ctx.bias_dtype)
        return dx, dweight, dbias, dresidual
    kernel = eager if differentiated_by_torch() else ctx.kernel  # vmap over dy: a batch of gradients at once
    dx, dresidual, sum_grad, sum_grad_xhat = reduction.backward(
        kernel,
        dy,
        x,
        by,
        epilogue.corrected(correction),
        ctx.needs_input_grad[0],
        ctx.call.reducer,
        ctx.call.groups,
    )
    if correction is not None:
        sum_grad_xhat = correction.weight_grad(sum_grad, sum_grad_xhat)
    if ctx.call.groups is not None:  # each (G, C)
        sum_grad, sum_grad_xhat = sum_grad.sum(0), sum_grad_xhat.sum(0)
    dweight = None if epilogue.weight is None else sum_grad_xhat.to(epilogue.weight.dtype)
    dbias = None if ctx.bias_dtype is None else sum_grad.to(ctx.bias_dtype)
    return dx, dweight, dbias, dresidual


def counted(dy: Tensor, mask: Tensor | None) -> Tensor:
    return dy if mask is None else torch.where(mask, dy, 0)


def saved_of_residual(epilogue: Epilogue, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The residual or the output, as `Epilogue.residual` and `Epilogue.output`: what the backward of the activation needs."""
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

    Each input is a fresh alias: if weight was computed from x, the gradient of x must not flow through weight. An activation with
    `derivative_from_output` is piecewise linear, so its derivative is a constant.
    """
    x = x.view_as(x)
    weight, bias, residual = (None if value is None else value.view_as(value) for value in epilogue[:3])
    inputs = (x, weight, bias, residual)
    activation, output, mask = epilogue.activation, epilogue.output, epilogue.mask
    if activation is not None and output is not None:
        dy = dy * activation.derivative(output.detach())
        activation = None
    epilogue = Epilogue(weight, bias, residual, mask, activation, None, epilogue.sample_weights).corrected(correction)
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


# The backward of a step in torch's own node if it is itself recorded, see csrc/torch/node.h.
torch.library.define(
    "batchnorm::differentiable_node_backward",
    "(Tensor x, Tensor dy, Tensor weight, Tensor? running_mean, Tensor? running_var, Tensor? mean, Tensor? rstd, float eps, "
    "Tensor reserve) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("batchnorm::differentiable_node_backward", "CompositeImplicitAutograd")
def _differentiable_node_backward(
    x: Tensor, dy: Tensor, weight: Tensor, *saved_and_eps: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, eps, _ = saved_and_eps
    dx, dweight, *_ = _differentiable_backward(dy, x, None, eps, Epilogue(weight), None, None, None)
    dbias = dy.sum([0, *range(2, dy.dim())], dtype=torch.float64).to(weight.dtype)
    nothing = torch.zeros_like(weight)  # of an input that needs no gradient
    return dx if dx is not None else torch.zeros_like(x), nothing if dweight is None else dweight, dbias
