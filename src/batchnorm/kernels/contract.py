"""The interface of a kernel: four verbs and two fused pairs.

    x ─moments─▶ (count, mean, M2) ──▶ mean, rstd ─normalize─▶ y
    dy ─reduce_grad─▶ (Σg, Σg·x̂) ──▶ ─input_grad─▶ dx, dresidual

with, channel by channel,

    rstd = 1 / sqrt(M2 / count + eps)                 x̂ = (x - mean) · rstd
    z    = weight · x̂ + bias + residual               y = activation(z)
    g    = dy · activation'(z)                        dresidual = g
    dx   = weight · rstd · (g - Σg / count - x̂ · Σg·x̂ / count)      when mean and rstd are those of x
    dx   = weight · rstd · g                                         when they are constants (inference)
    dweight = Σg·x̂                                    dbias = Σg

(Ioffe & Szegedy 2015, Algorithm 1 and the equations below it, with the activation's gradient taken in.)

Shapes: x, y, residual and their gradients (N, C, *S) in any strides; channel values (C,). Channel values are float64 (float32 on
devices without it): at mean 1e4 a float32 mean alone costs 5e-4 of the deviation.
A mask is boolean and broadcasts against (N, 1, *S); where it is False nothing is counted, y is 0 and no gradient flows, whatever x holds.

With sample weights w, of sum W, in place of the count:

    mean = Σ w·x / W        M2 = Σ w·(x - mean)²        dx = weight · rstd · (g - w · Σg / W - w · x̂ · Σg·x̂ / W)

Only two verbs know of them, `weighted_moments` and `input_grad`: y is normalized as without them, and Σg and Σg·x̂ are the plain sums,
because a sample has one output, whatever its weight. The fused pairs never get sample weights (`functional.reduction`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from batchnorm.kernels.activation import Activation
from batchnorm.kernels.correction import Correction, Renormalization
from batchnorm.moments import Moments


class Epilogue(NamedTuple):
    """The operations between x̂ and y.

    Attributes:
        weight: gamma, (C,) or None for 1.
        bias: beta, (C,) or None for 0.
        residual: added before the activation; x's shape, or None.
        mask: bool, (N, 1, *S) or broadcastable to it; True counts. None counts all.
        activation: applied last, or None.
        output: y, in the backward only, instead of the residual: with `Activation.derivative_from_output` the derivative can be
            computed from y, which the next layer saves anyway.
        sample_weights: how often each position counts, (N, 1, *S) or broadcastable to it, in the wide dtype; 0 where the mask is
            False. In `input_grad`, their shares w / W. None counts each once.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    activation: Activation | None = None
    output: Tensor | None = None
    sample_weights: Tensor | None = None

    @property
    def has_residual(self) -> bool:
        """Whether the backward computes dresidual."""
        return self.residual is not None or self.output is not None

    def wider_than(self, x: Tensor) -> str | None:
        """Why a kernel that computes in x's dtype or float32 does not accept the parameters: they are float64 and x is not."""
        parameters = (self.weight, self.bias)
        if x.dtype is torch.float64 or not any(each is not None and each.dtype is torch.float64 for each in parameters):
            return None
        return f"the parameters are float64 and x is {x.dtype}"

    def elsewhere(self, x: Tensor) -> str | None:
        """Which operand is on another device than x, or None."""
        for what, value in self._asdict().items():
            if isinstance(value, Tensor) and value.device != x.device:
                return f"x is on {x.device}, and the {what.replace('_', ' ')} on {value.device}"
        return None

    def affine(self) -> Epilogue:
        """The weight and the bias alone."""
        return Epilogue(self.weight, self.bias)

    def after(self, y: Tensor) -> Tensor:
        """What remains to be done after `affine`: add the residual, and apply the activation, both in the wider dtype of the two."""
        z = y if self.residual is None else y + self.residual
        return (z if self.activation is None else self.activation(z)).to(y.dtype)

    def corrected(self, correction: Correction | None) -> Epilogue:
        """The epilogue that computes from x̂ what this one computes from x̂ · r + d."""
        if correction is None:
            return self
        r, d = correction
        weight, bias = (r, d) if self.weight is None else (r * self.weight, d * self.weight)
        return self._replace(weight=weight, bias=bias if self.bias is None else bias + self.bias)


class Groups(NamedTuple):
    """Groups of samples that are normalized separately. Mean, M2, rstd and the sums are (G, C), and the count is (G,).

    Attributes:
        number: of groups, G, at least 2.
        size: samples in each but the last, which has all that are left.
    """

    number: int
    size: int

    def bounds(self, N: int) -> list[tuple[int, int]]:
        """First and last sample, exclusive, of each group of N samples."""
        starts = [group * self.size for group in range(self.number)]
        return list(zip(starts, [*starts[1:], N], strict=True))


class Forward(NamedTuple):
    """The results of the fused forward pair.

    Attributes:
        output: y.
        moments: of x, or of each group.
        rstd: 1 / sqrt(variance + eps), likewise.
        correction: r and d of `forward_renormalized`, or None.
        reserve: what this kernel's `backward` needs besides, or None.
    """

    output: Tensor
    moments: Moments
    rstd: Tensor
    correction: Correction | None = None
    reserve: Tensor | None = None


class Normalized(NamedTuple):
    """The statistics that x was normalized with.

    Attributes:
        mean, rstd: (C,), or (G, C) of groups.
        count: values per channel, also 0-d, or (G,) of groups; None where the statistics are constants.
        reserve: of `Forward`, or None.
    """

    mean: Tensor
    rstd: Tensor
    count: int | Tensor | None  # pyright: ignore[reportIncompatibleMethodOverride] (of a tuple's method)
    reserve: Tensor | None = None


class Backward(NamedTuple):
    """The results of the fused backward pair.

    Attributes:
        input: dx, or None where it was not asked for.
        residual: dresidual, or None without a residual.
        sum_grad: Σg, (C,), or (G, C) of groups: the gradient of the bias.
        sum_grad_xhat: Σg·x̂, likewise: the gradient of the weight.
    """

    input: Tensor | None
    residual: Tensor | None
    sum_grad: Tensor
    sum_grad_xhat: Tensor


class Running(NamedTuple):
    """The buffers of a layer that training updates in place.

    Attributes:
        mean: running mean, (C,).
        variance: running variance, (C,).
        batches: number of batches that updated them, 0-d int64, or None.
        skipped: number of batches that did not, because they were not finite, 0-d int64, or None.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor | None = None
    skipped: Tensor | None = None


class Update(NamedTuple):
    """How a batch updates running statistics: running = (1 - momentum) · running + momentum · batch.

    Attributes:
        momentum: the weight of the batch; a number or a 0-d tensor.
        unbiased: whether the batch's variance is divided by count - 1.
        skip_nonfinite: update neither buffer if the batch's statistics are not finite in their dtype.
        unless: 0-d bool, True where nothing is updated; None is False.
    """

    momentum: float | Tensor = 0.1
    unbiased: bool = True
    skip_nonfinite: bool = False
    unless: Tensor | None = None


class Step(NamedTuple):
    """A layer's call as one operator, and its backward as another: a tensor of a few kilobytes costs little more than its calls.

    Attributes:
        forward: takes x, weight, bias, a residual like x, the buffers and options of the layer, eps, and the activation as
            `activation_code` returns it. Returns y and the statistics saved for backward: mean and rstd, (2, C), or mean, rstd, r
            and d, (4, C). If it does not accept the call, both are empty and nothing was written.
        backward: takes dy, x, the statistics, weight, bias, the residual or y, the activation, whether it was y, and whether dresidual
            and dx are wanted; returns dx, dweight, dbias and dresidual.
        constant_statistics: whether the statistics are constants in the backward.
        activation_code: the number and the slope of an activation, as the operators take them; None if they do not have it.
        kernel: the kernel whose verbs compute the backward if it is differentiated again.
        in_torchs_node: the call without residual and activation, recorded by an autograd node of torch's own, where there is one; takes
            a contiguous x, weight, bias, and a tuple of the buffers and options up to eps. Returns y, or None if it does not accept the
            call; then nothing was written.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    constant_statistics: bool
    activation_code: Callable[[Activation | None], tuple[int, float] | None]
    kernel: Kernel
    in_torchs_node: Callable[..., Tensor | None] | None = None


class Steps(NamedTuple):
    """The steps of a kernel.

    Attributes:
        training: `Kernel.forward` and `Kernel.update_running`.
        renormalization: `Kernel.forward_renormalized` and `Kernel.update_running`.
        inference: `Kernel.infer`.
    """

    training: Step
    renormalization: Step
    inference: Step


def values_per_channel(x: Tensor) -> int:
    """How many values of x (N, C, *S) share a mean."""
    return x.numel() // x.shape[1] if x.shape[1] else 0


def sum_of_weights(x: Tensor, sample_weights: Tensor) -> Tensor:
    """The sum of sample weights over all positions of x, 0-d."""
    positions = values_per_channel(x)
    return sample_weights.sum() * (positions / max(sample_weights.numel(), 1))


class Kernel(Protocol):
    """An implementation of the verbs. `kernels.select` returns the first kernel that accepts a call."""

    name: str
    fuses: bool  # whether it applies residual and activation; if not, it gets weight and bias only

    def status(self) -> str:
        """How the kernel runs on this machine, or why it accepts no call here."""
        ...

    def refuses(self, x: Tensor, epilogue: Epilogue, plain: bool = True) -> str | None:
        """Why this kernel does not accept the call, or None if it does; `plain` as in `kernels.select`."""
        ...

    def moments(self, x: Tensor, mask: Tensor | None) -> Moments:
        """Count, mean and M2 of each channel."""
        ...

    def weighted_moments(self, x: Tensor, sample_weights: Tensor) -> Moments:
        """`moments` with sample weights, as in `Epilogue`; where they are 0 nothing is counted. The count is their sum."""
        ...

    def normalize(self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
        """y from given statistics; x's dtype and, where x is dense, its strides."""
        ...

    def infer(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, epilogue: Epilogue
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`normalize` by running statistics of any floating dtype: y, and the mean and rstd the backward needs."""
        ...

    def reduce_grad(
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue
    ) -> tuple[Tensor, Tensor]:
        """Σg and Σg·x̂ of each channel."""
        ...

    def input_grad(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        epilogue: Epilogue,
        mean_grads: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """dx and dresidual; `mean_grads` is (Σg / count, Σg·x̂ / count), or None if the statistics are constants.

        With `sample_weights`, which are shares of their sum here, it is (Σg, Σg·x̂).
        """
        ...

    def forward(self, x: Tensor, eps: float, epilogue: Epilogue, groups: Groups | None = None) -> Forward:
        """`moments` and `normalize`, fused."""
        ...

    def forward_renormalized(
        self, x: Tensor, eps: float, epilogue: Epilogue, renormalization: Renormalization
    ) -> Forward:
        """`forward` with x̂ · r + d instead of x̂."""
        ...

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        by: Normalized,
        epilogue: Epilogue,
        needs_input_grad: bool = True,
        groups: Groups | None = None,
    ) -> Backward:
        """`reduce_grad` and `input_grad`, fused. The statistics of groups are never constants."""
        ...

    def takes_update(self, running: Running, moments: Moments, update: Update) -> bool:
        """Whether `update_running` takes these buffers and moments."""
        ...

    def update_running(self, running: Running, moments: Moments, update: Update) -> Tensor | None:
        """Update the running statistics in place, and count the batch.

        Computed in the moments' dtype and rounded once. A count of one value that only the device knows updates nothing. Returns a
        0-d bool, whether the batch's statistics were finite; None without `skip_nonfinite`.
        """
        ...
