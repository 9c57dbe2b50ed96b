"""Between the reductions and the maps: the one place where moments and sums of gradients meet those of other replicas.

    x ─moments─▶ (count, mean, M2) ─merge─▶ mean, rstd ─normalize─▶ y
    dy ─reduce_grad─▶ (Σg, Σg·x̂) ─sum─▶ ─input_grad─▶ dx

Without a reducer nothing stands there, and the kernels run each line fused.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from batchnorm.kernels import Backward, Correction, Epilogue, Groups, Kernel, Renormalization
from batchnorm.moments import Moments, at_least_one


class Reducer(Protocol):
    """What merges the statistics of several replicas; every replica gets the same."""

    @property
    def size(self) -> int:
        """How many replicas there are."""
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
) -> tuple[Tensor, Moments, Tensor, Correction | None]:
    """`Kernel.forward`, with the statistics of all replicas: y, the moments it was normalized with, their rstd, and r and d if asked for.

    Groups have no replicas. `known` moments are those of all replicas already, and nothing is reduced.
    """
    if known is None and (groups is not None or reducer is None):
        if renormalization is not None:
            return kernel.forward_renormalized(x, eps, epilogue, renormalization)
        return *kernel.forward(x, eps, epilogue, groups), None
    moments = known if known is not None or reducer is None else reducer.merge(kernel.moments(x, epilogue.mask))
    assert moments is not None
    rstd = moments.rstd(eps)
    correction = None if renormalization is None else renormalization.of(moments, eps)
    return kernel.normalize(x, moments.mean, rstd, epilogue.corrected(correction)), moments, rstd, correction


def backward(
    kernel: Kernel,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    count: int | Tensor | None,
    needs_input_grad: bool,
    reducer: Reducer | None,
    groups: Groups | None = None,
) -> Backward:
    """`Kernel.backward`, with dx through the statistics of all replicas.

    The sums that become dweight and dbias are this replica's own: adding those of all replicas, as data-parallel training does,
    is left to whoever owns the parameters.
    """
    if groups is not None or reducer is None or not needs_input_grad:
        return kernel.backward(dy, x, mean, rstd, epilogue, count, needs_input_grad, groups)
    sums = kernel.reduce_grad(dy, x, mean, rstd, epilogue)
    divisor = at_least_one(0 if count is None else count)
    total, total_xhat = reducer.sum(*sums)
    means = total / divisor, total_xhat / divisor
    dx, dresidual = kernel.input_grad(dy, x, mean, rstd_for_input_grad(rstd, count), epilogue, means)
    return Backward(dx, dresidual, *sums)


def rstd_for_input_grad(rstd: Tensor, count: int | Tensor | None) -> Tensor:
    """rstd, or 0 if the statistics are those of one value: it is its own mean, so dx is 0, and the formula would leave rounding."""
    return rstd if count is None else rstd * (count != 1)
