"""Normalization by moving averages in the forward and the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchnorm import kernels
from batchnorm.errors import DTypeError, InputError, ShapeError, StateError
from batchnorm.functional import Reducer, moments, normalize_with, recomputing
from batchnorm.functional.checks import epilogue_of
from batchnorm.functional.joint import Joint
from batchnorm.functional.recompute import recomputing_now
from batchnorm.kernels import Epilogue
from batchnorm.kernels.correction import saved
from batchnorm.moments import Moments, divisor_of
from batchnorm.statistics import recomputed
from batchnorm.statistics.common import check_call, reducer_of, train_or_infer
from batchnorm.statistics.contract import Layer, SourceBuffer, check_buffers
from batchnorm.torch_state import differentiated_by_torch, unseen_by_checkpoints

_FORWARD = ("running_mean_window", "running_var_window")
_BACKWARD = ("running_mean_gradient", "running_var_gradient")


@dataclass(frozen=True)
class MovingAverage:
    """Moving average batch normalization (Yan et al. 2020, arXiv:2001.06838): for batches of a few samples.

    The gradient of batch normalization contains two more statistics of the batch, as noisy as its mean and variance:

        z  = (x - mean) / sigma          y = gamma · r · z + beta          g = gradient of z = gamma · r · dy
        dx = (g - <g> - z · <g · z>) / sigma

    This source averages all four over the last `window` batches: mean and sigma² in the forward, <g> and <g · z> in the backward (the
    paper's section 4.1). The statistics of the window update the running statistics. r = clip(sigma / running sigma, 1 / r_max, r_max),
    a constant in the backward, makes training normalize as inference does. The first batches, `warmup` of them and at least `window`,
    use their own statistics and r = 1: plain batch normalization.

    With `centered`, mean and <g> are fixed at 0 and sigma² is the mean of x², which leaves half of the statistics (the paper's section
    4.2, its MABN). The layer before should have no bias, and weights centered to sum to 0 for each output. The running mean then
    converges to 0.

    The windows are buffers of the layer, (window, C) each. If the layer was trained with another source, the windows of the forward
    start with its running statistics and those of the gradient are empty; averages are taken over batches that had a backward. The
    backward writes two buffers, so the gradient is not a derivative: it cannot be differentiated again, and `torch.func` raises. In an
    `accumulate` context each batch counts on its own.

    Args:
        window: number of batches averaged; 16 in the paper.
        r_max: at least 1.
        warmup: number of batches with plain batch normalization.
        centered: fix the mean at 0.

    Raises:
        InputError: on an argument out of range.
        StateError: when used by a layer without running statistics, or under a `torch.func` transform.
        DTypeError: on complex input.
    """

    infers_by_running_statistics: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = True

    window: int = 16
    r_max: float = 5.0
    warmup: int = 100
    centered: bool = False

    def __post_init__(self) -> None:
        if not (self.window >= 1 and self.r_max >= 1 and self.warmup >= 0):
            raise InputError(f"window and r_max must be at least 1, warmup at least 0, but got {self}")

    def __call__(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None = None
    ) -> Tensor:
        return train_or_infer(layer, x, residual, mask, self._by_windows, accumulates=False, weights=weights)

    def layer_buffers(self) -> dict[str, SourceBuffer]:
        # The gradient windows start blank: copies of the running mean would be taken for <g>.
        forward = {name: SourceBuffer(name.removesuffix("_window"), self.window) for name in _FORWARD}
        return forward | {name: SourceBuffer("running_mean", self.window, blank=True) for name in _BACKWARD}

    def _by_windows(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Moments]:
        running_var, counter = layer.running_var, layer.num_batches_tracked
        if running_var is None or counter is None:
            raise StateError(
                "moving averages need running statistics, but this layer has none; build it with track_running_stats=True"
            )
        check_buffers(layer, *_FORWARD, *_BACKWARD)
        if x.is_complex():
            raise DTypeError("moving averages need real input, but got complex; use Batch()")
        if differentiated_by_torch():
            raise StateError(
                "the backward of moving averages writes buffers, which torch.func cannot follow; use Batch() or Running() there"
            )
        if weights is not None and weights.requires_grad and torch.is_grad_enabled():
            raise StateError(
                "moving averages treat weights as constants, but these require a gradient; pass weights.detach(), or use Batch()"
            )
        check_call(layer, x, residual, mask, weights)
        self._check_windows(layer, x.shape[1])
        reducer = reducer_of(layer)
        if isinstance(reducer, Joint):
            raise StateError(
                "MovingAverage averages whole batches, but as_one_batch forwards micro-batches; use Batch() or Renorm() there"
            )
        batch = moments(x, mask, weights=weights)
        batch = batch if reducer is None else reducer.merge(batch).detach()
        with torch.no_grad(), unseen_by_checkpoints():
            used = self._used(layer, x, batch, running_var, counter)
            if recomputed.is_needed():
                key = batch.mean, batch.rstd(layer.eps)
                if recomputing():
                    used = recomputed.look_up(layer, *key, used)
                else:
                    recomputed.store(layer, *key, used)
            mean, variance, r, averaged, use, before = used
            sigma = (variance + layer.eps).sqrt()
        several = batch.has_variance()  # if not, nothing is updated and the count stays as it is
        count = batch.count * torch.where(use & several, self.window, 1).double()
        place = self._place(before) & several
        mean_g, mean_gz = (getattr(layer, name) for name in _BACKWARD)
        windows = _Windows(mean_g, mean_gz, place, averaged, self.centered)
        if torch.is_grad_enabled() and x.requires_grad:
            sample = epilogue_of(x, None, None, None, None, mask, weights)
            x = _Corrected.apply(x, sample.mask, sample.sample_weights, mean, sigma, batch.count, windows, reducer)
        dtype = torch.promote_types(x.dtype, torch.float32)
        for parameter in (layer.gamma, layer.beta):
            dtype = dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
        weight = (r if layer.gamma is None else r * layer.gamma).to(dtype)
        y = normalize_with(
            x, mean, variance, weight, layer.beta, layer.eps, activation=layer.activation, residual=residual, mask=mask
        )
        return y, Moments(count, mean, variance * divisor_of(count))

    def _check_windows(self, layer: Layer, channels: int) -> None:
        for name in (*_FORWARD, *_BACKWARD):
            shape = tuple(getattr(layer, name).shape)
            if shape != (self.window, channels):
                raise ShapeError(
                    f"{name} must be (window, C) = ({self.window}, {channels}) for this source and input, but has shape {shape}; "
                    "assign layer.statistics again, which creates windows of the right size"
                )

    def _used(self, layer: Layer, x: Tensor, batch: Moments, running_var: Tensor, counter: Tensor) -> _Used:
        """Write the batch into the windows, and compute the statistics that normalize it."""
        means, variances = (getattr(layer, name) for name in _FORWARD)
        # In a recomputation the windows already hold this batch and the counter includes it.
        again = recomputing_now(x)
        before = saved(counter - again.to(counter.dtype))
        variance = batch.variance()
        finite = _is_finite(batch.mean, means) & _is_finite(variance, variances)
        counts = finite if layer.on_nonfinite != "propagate" else torch.ones_like(finite)
        learns = self._place(before) & counts & ~again & batch.has_variance()
        if not layer.track_running_stats:
            learns = torch.zeros_like(learns)
        _put(means, learns, batch.mean)
        _put(variances, learns, variance)
        averaged = before >= max(self.window, self.warmup)
        use = averaged & counts
        mean = torch.where(use, means.to(batch.mean.dtype).mean(0), batch.mean)
        if self.centered:
            mean = torch.where(counts, torch.zeros_like(mean), batch.mean)
        within = torch.where(use, variances.to(mean.dtype).mean(0), variance)
        between = torch.where(use, means.to(mean.dtype) - mean, batch.mean - mean).square().mean(0)
        mean, variance = saved(mean), saved(within + between)
        sigma = (variance + layer.eps).sqrt()
        r = (sigma / (running_var.to(sigma.dtype) + layer.eps).sqrt()).clamp(1 / self.r_max, self.r_max)
        return _Used(mean, variance, saved(torch.where(use, r, torch.ones_like(r))), averaged, use, before)

    def _place(self, before: Tensor) -> Tensor:
        """Which row of the windows belongs to the batch that follows `before` batches: a mask (window, 1)."""
        return (torch.arange(self.window, device=before.device) == before % self.window).unsqueeze(1)


class _Used(NamedTuple):
    """Statistics that normalize a batch, (C,) each; and 0-d: whether the windows are full, whether they are used, batches before."""

    mean: Tensor
    variance: Tensor
    r: Tensor
    averaged: Tensor
    use: Tensor
    before: Tensor


class _Windows(NamedTuple):
    """The windows of the backward (window, C), the row of this batch in them, and whether they are full (0-d bool)."""

    g: Tensor
    gz: Tensor
    place: Tensor
    averaged: Tensor
    centered: bool


class _Corrected(torch.autograd.Function):
    """Return x, and in the backward turn its gradient g / sigma into (g - <g> - z · <g · z>) / sigma, with <> from the windows.

    With sample weights w, which make the averages weighted ones: (g - w · <g> - w · z · <g · z>) / sigma.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        mean: Tensor,
        sigma: Tensor,
        count: int | Tensor,
        windows: _Windows,
        reducer: Reducer | None,
    ) -> Tensor:
        ctx.save_for_backward(x, mask, weights, mean, sigma)
        ctx.count, ctx.windows, ctx.reducer = count, windows, reducer
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the name of ctx)
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, mask, weights, mean, sigma = ctx.saved_tensors
        windows: _Windows = ctx.windows
        dtype = torch.promote_types(x.dtype, torch.float32)
        along = (1, -1, *[1] * (x.dim() - 2))
        epilogue = Epilogue(mask=mask)
        kernel = kernels.select(x, epilogue, plain=False)  # its sums do not depend on the amount of padding
        sums = kernel.reduce_grad(grads[0], x, mean, sigma.reciprocal(), epilogue)  # of g / sigma, (C,) each
        sums = sums[0] * sigma, sums[1] * sigma
        mean, wide_sigma = mean.to(dtype).view(along), sigma.to(dtype).view(along)
        z = (x.to(dtype) - mean) / wide_sigma
        if mask is not None:
            z = z.masked_fill(~mask, 0.0)
        g = grads[0].to(dtype) * wide_sigma
        if ctx.reducer is not None:
            sums = ctx.reducer.sum(*sums)
        mean_g, mean_gz = (value / divisor_of(ctx.count) for value in sums)
        learns = windows.place & _is_finite(mean_g, windows.g) & _is_finite(mean_gz, windows.gz)
        if not windows.centered:
            _put(windows.g, learns, mean_g)
        _put(windows.gz, learns, mean_gz)
        # Rows of zeros were never written: the layer was trained with another source, or their forwards had no backward.
        written = ((windows.g != 0) | (windows.gz != 0)).any(1).sum().clamp(min=1)
        mean_g, mean_gz = (
            torch.where(windows.averaged, window.to(value.dtype).sum(0) / written, value).to(dtype).view(along)
            for window, value in ((windows.g, mean_g), (windows.gz, mean_gz))
        )
        through = z * mean_gz if windows.centered else mean_g + z * mean_gz
        if weights is not None:
            through = through * weights.to(dtype)
        if mask is not None:
            through = through.masked_fill(~mask, 0.0)
        return ((g - through) / wide_sigma).to(x.dtype), *[None] * 7


def _is_finite(row: Tensor, window: Tensor) -> Tensor:
    """Whether a row is finite in the dtype of the window, 0-d bool: float64 statistics may exceed the range of a float32 window."""
    return row.to(window.dtype).isfinite().all()


def _put(window: Tensor, place: Tensor, row: Tensor) -> None:
    """Write a row (C,) into a window (window, C) where the mask `place` (window, 1) is set; no host synchronization."""
    window.copy_(torch.where(place, row.to(window.dtype), window))
