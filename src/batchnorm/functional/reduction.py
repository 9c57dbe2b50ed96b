"""Between the reductions and the maps: the one place where moments and sums of gradients are merged with those of other replicas.

    x ─moments─▶ (count, mean, M2) ─merge─▶ mean, rstd ─normalize─▶ y
    dy ─reduce_grad─▶ (Σg, Σg·x̂) ─sum─▶ ─input_grad─▶ dx

Without a reducer, the kernels run each line fused.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from batchnorm.kernels import Backward, Epilogue, Forward, Groups, Kernel, Normalized, Renormalization
from batchnorm.moments import Moments, at_least_one


class Reducer(Protocol):
    """Merges the statistics of several replicas; every replica gets the same result."""

    @property
    def size(self) -> int:
        """Number of replicas."""
        ...

    def merge(self, moments: Moments) -> Moments:
        """The moments of all replicas together; differentiable, the count a 0-d float64 tensor."""
        ...

    def sum(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Σg and Σg·x̂, (C,) each, of all replicas together."""
        ...


def forward(
    kernel: Kernel,
    x: Tensor,
    eps: float,
    epilogue: Epilogue,
    reducer: Reducer | None,
    groups: Groups | None = None,
    known: Moments | None = None,
    renormalization: Renormalization | None = None,
) -> Forward:
    """`Kernel.forward`, or `Kernel.forward_renormalized`, with the statistics of all replicas.

    Groups are not merged with those of replicas. `known` moments are of all replicas already, so nothing is reduced.
    """
    if known is None and (groups is not None or reducer is None):
        if renormalization is not None:
            return kernel.forward_renormalized(x, eps, epilogue, renormalization)
        return kernel.forward(x, eps, epilogue, groups)
    moments = known if known is not None or reducer is None else reducer.merge(kernel.moments(x, epilogue.mask))
    assert moments is not None
    rstd = moments.rstd(eps)
    correction = None if renormalization is None else renormalization.of(moments, eps)
    y = kernel.normalize(x, moments.mean, rstd, epilogue.corrected(correction))
    return Forward(y, moments, rstd, correction)


def backward(
    kernel: Kernel,
    dy: Tensor,
    x: Tensor,
    by: Normalized,
    epilogue: Epilogue,
    needs_input_grad: bool,
    reducer: Reducer | None,
    groups: Groups | None = None,
) -> Backward:
    """`Kernel.backward`, with dx through the statistics of all replicas.

    The sums, which become dweight and dbias, are of this replica only: data-parallel training adds those of all replicas.
    """
    if groups is not None or reducer is None or not needs_input_grad:
        return kernel.backward(dy, x, by, epilogue, needs_input_grad, groups)
    sums = kernel.reduce_grad(dy, x, by.mean, by.rstd, epilogue)
    divisor = at_least_one(0 if by.count is None else by.count)
    total, total_xhat = reducer.sum(*sums)
    means = total / divisor, total_xhat / divisor
    dx, dresidual = kernel.input_grad(dy, x, by.mean, rstd_for_input_grad(by.rstd, by.count), epilogue, means)
    return Backward(dx, dresidual, *sums)


def rstd_for_input_grad(rstd: Tensor, count: int | Tensor | None) -> Tensor:
    """rstd, or 0 if there is one value per channel: it equals the mean, so dx is 0, where the formula would give rounding errors."""
    return rstd if count is None else rstd * (count != 1)
