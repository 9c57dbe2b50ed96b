"""Between the reductions and the maps: the one place where moments and sums of gradients are merged with those of other replicas.

    x ─moments─▶ (count, mean, M2) ─merge─▶ mean, rstd ─normalize─▶ y
    dy ─reduce_grad─▶ (Σg, Σg·x̂) ─sum─▶ ─input_grad─▶ dx

Without a reducer, the kernels run each line fused. With sample weights the lines are composed here too: between their verbs the count
becomes the sum of the weights.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from batchnorm.kernels import Backward, Epilogue, Forward, Groups, Kernel, Normalized, Renormalization, eager
from batchnorm.moments import Moments, divisor_of


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
    weighted = epilogue.sample_weights is not None
    if known is None and (groups is not None or reducer is None):
        if weighted and groups is not None:
            return eager.forward_groups(x, epilogue, groups, lambda x, given: forward(kernel, x, eps, given, None))
        if not weighted and renormalization is not None:
            return kernel.forward_renormalized(x, eps, epilogue, renormalization)
        if not weighted:
            return kernel.forward(x, eps, epilogue, groups)
    moments = moments_of(kernel, x, epilogue) if known is None else known
    if known is None and reducer is not None:
        moments = reducer.merge(moments)
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
    weighted = epilogue.sample_weights is not None and needs_input_grad
    if weighted and groups is not None:

        def of_group(dy: Tensor, x: Tensor, by: Normalized, epilogue: Epilogue) -> Backward:
            return backward(kernel, dy, x, by, epilogue, needs_input_grad, None)

        return eager.backward_groups(dy, x, by, epilogue, groups, of_group)
    if not weighted and (groups is not None or reducer is None or not needs_input_grad):
        return kernel.backward(dy, x, by, epilogue, needs_input_grad, groups)
    sums = kernel.reduce_grad(dy, x, by.mean, by.rstd, epilogue)
    total = sums if reducer is None else reducer.sum(*sums)
    dx, dresidual = input_grad(kernel, dy, x, by, epilogue, total)
    return Backward(dx, dresidual, *sums)


def moments_of(kernel: Kernel, x: Tensor, epilogue: Epilogue) -> Moments:
    """`Kernel.moments`, or `Kernel.weighted_moments` where there are sample weights."""
    weights = epilogue.sample_weights
    return kernel.moments(x, epilogue.mask) if weights is None else kernel.weighted_moments(x, weights)


def input_grad(
    kernel: Kernel, dy: Tensor, x: Tensor, by: Normalized, epilogue: Epilogue, sums: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """`Kernel.input_grad` given Σg and Σg·x̂ of all values that were normalized together."""
    divisor = divisor_of(0 if by.count is None else by.count)
    weights = epilogue.sample_weights
    if weights is not None:  # shares, so that weights of any scale stay within float32's range
        shares = epilogue._replace(sample_weights=weights / divisor)
        return kernel.input_grad(dy, x, by.mean, by.rstd, shares, sums)
    # A single value per channel equals the mean, so dx is 0, where the formula would give rounding errors.
    rstd = by.rstd if by.count is None else by.rstd * (by.count != 1)
    return kernel.input_grad(dy, x, by.mean, rstd, epilogue, (sums[0] / divisor, sums[1] / divisor))
