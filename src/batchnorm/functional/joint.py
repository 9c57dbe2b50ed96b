"""Statistics of one batch from micro-batches in one process, merged between the reductions and the maps, in forward and backward.

In several processes, the backward of a layer can wait for the others. In one process it cannot, since autograd runs one node after
another. So the graph itself fixes the order, with two nodes for each micro-batch and one for all:

    x ──enter──▶ x, (count, mean, M2) ──pool──▶ those of all ──leave──▶ y
    dx ◀──enter── dy, (Σg, Σg·x̂) of all ◀──pool── (Σg, Σg·x̂) ◀──leave── dy

In the backward, an edge does not carry the gradient of its forward value, but what the next node needs for `input_grad`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchnorm import kernels
from batchnorm.errors import StateError
from batchnorm.functional.autograd import counted, saved_of_residual
from batchnorm.functional.reduction import Reducer, input_grad, moments_of
from batchnorm.kernels import Correction, Epilogue, Kernel, Normalized, Renormalization
from batchnorm.moments import Moments


class Joint(ABC):
    """The reducer of a layer that is called for several micro-batches of one batch."""

    size = 2  # or more
    replicas: Reducer | None  # of the layer

    @abstractmethod
    def accepts(self, own: Tensor) -> bool:
        """Whether the call with these moments belongs to a micro-batch; a recomputation may not."""

    @abstractmethod
    def join(self, own: Tensor) -> Tensor:
        """The moments of all micro-batches, given those of one, as `Moments.row`; differentiable in the sense of this module."""

    @abstractmethod
    def record(self, call: Call) -> None:
        """Store a call that has a graph, for its recomputation."""

    def merge(self, moments: Moments) -> Moments:
        return Moments.of_row(self.join(moments.row()))

    def sum(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002 (the protocol)
        raise StateError(
            "micro-batches are merged by nodes of autograd's graph, not within a backward; use Batch() or Renorm() under as_one_batch"
        )


class Call:
    """What the two nodes of a micro-batch share.

    Attributes:
        own: the moments of the micro-batch, as a row.
        all: the moments of all micro-batches, as a row.
        rstd: 1 / sqrt(variance + eps) of all micro-batches, (C,).
        correction: r and d of batch renormalization, or None.
        sample_weights: of the micro-batch, or None.
        epilogue: passed from the backward of `_Leave` to that of `_Enter`.
    """

    def __init__(self, kernel: Kernel, own: Tensor, sample_weights: Tensor | None) -> None:
        self.kernel, self.own, self.sample_weights = kernel, own, sample_weights
        self.all: Tensor = own
        self.rstd: Tensor | None = None
        self.correction: Correction | None = None
        self.epilogue: Epilogue | None = None


def normalize(
    x: Tensor, eps: float, epilogue: Epilogue, joint: Joint, renormalization: Renormalization | None
) -> tuple[Tensor, Moments] | None:
    """`functional.normalize` with the moments of all micro-batches, if a gradient is needed; None if the call is not of a micro-batch."""
    weight, bias, residual, mask, activation, *_ = epilogue
    kernel = kernels.select(x, epilogue, plain=False)
    with torch.no_grad():
        call = Call(kernel, moments_of(kernel, x, epilogue).row(), epilogue.sample_weights)
        if not joint.accepts(call.own):
            return None
    constant = None if weight is None else weight.detach()  # the other node computes its gradient
    x, residual, own = _Enter.apply(x, residual, constant, mask, activation is None, call)
    pooled = joint.join(own)
    batch = Moments.of_row(pooled.detach())
    call.all, call.rstd = pooled.detach(), batch.rstd(eps)
    call.correction = None if renormalization is None else renormalization.of(batch, eps)
    joint.record(call)
    return _Leave.apply(x, residual, pooled, weight, bias, mask, activation, call), batch


def pool(rows: list[Tensor], replicas: Reducer | None) -> Tensor:
    """The moments of all micro-batches of all replicas, given the rows of this replica's micro-batches."""
    return _Pool.apply(replicas, *rows)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        mask: Tensor | None,
        linear: bool,
        call: Call,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.linear = call, linear
        ctx.save_for_backward(x, weight, mask)
        return x.view_as(x), None if residual is None else residual.view_as(residual), call.own.view_as(call.own)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the name of ctx)
        ctx: Any, dy: Tensor | None, _: Tensor | None, total: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x, weight, mask = ctx.saved_tensors
        epilogue, call.epilogue = call.epilogue, None
        if total is None:  # no micro-batch's output has a gradient
            return (None,) * 6
        if dy is None or epilogue is None:  # only the outputs of others have one, which flows through the statistics
            dy, epilogue = torch.zeros_like(x), Epilogue(weight, None, None, mask).corrected(call.correction)
        count, mean, _m2 = Moments.of_row(call.all)
        sums = Moments.of_row(total)
        assert call.rstd is not None
        epilogue = epilogue._replace(sample_weights=call.sample_weights)
        by = Normalized(mean, call.rstd, count)
        dx, dresidual = input_grad(call.kernel, dy, x, by, epilogue, (sums.mean, sums.m2))
        if ctx.linear and ctx.needs_input_grad[1]:
            dresidual = counted(dy, mask)
        return dx, dresidual if ctx.needs_input_grad[1] else None, None, None, None, None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replicas: Reducer | None, *rows: Tensor) -> Tensor:
        ctx.replicas, ctx.micro_batches = replicas, len(rows)
        pooled = Moments.pooled_rows(torch.stack(rows))
        return (pooled if replicas is None else replicas.merge(pooled)).row()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the name of ctx)
        ctx: Any, total: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.replicas is not None:
            count, *sums = Moments.of_row(total)
            total = Moments(count, *ctx.replicas.sum(*sums)).row()
        return None, *[total] * ctx.micro_batches


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        pooled: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        activation: Any,
        call: Call,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.activation = call, activation
        ctx.bias_dtype = None if bias is None else bias.dtype
        assert call.rstd is not None
        epilogue = Epilogue(weight, bias, residual, mask, activation)
        y = call.kernel.normalize(x, Moments.of_row(pooled).mean, call.rstd, epilogue.corrected(call.correction))
        ctx.save_for_backward(x, weight, None if activation is None else bias, *saved_of_residual(epilogue, y), mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the name of ctx)
        ctx: Any, dy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        call: Call = ctx.call
        x, weight, bias, residual, output, mask = ctx.saved_tensors
        epilogue = Epilogue(weight, bias, residual, mask, ctx.activation, output).corrected(call.correction)
        mean = Moments.of_row(call.all).mean
        assert call.rstd is not None
        sums = call.kernel.reduce_grad(dy, x, mean, call.rstd, epilogue)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            call.epilogue = epilogue
        dweight = sums[1] if call.correction is None else call.correction.weight_grad(*sums)
        return (
            dy,
            None,
            Moments(0, *sums).row(),
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else sums[0].to(ctx.bias_dtype),
            None,
            None,
            None,
        )
