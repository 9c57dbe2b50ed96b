"""The verbs in plain torch, for any device, dtype and strides. It is the last kernel of the list, and the reference for the others.

Everything is computed in the wide dtype and rounded once at the end. If x already has that dtype, the mean is corrected by the mean of
the deviations (two passes, Neumaier's remark in Chan et al. 1983), so that a large mean does not cost digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm.kernels import buffers
from batchnorm.kernels.contract import (
    Backward,
    Epilogue,
    Forward,
    Groups,
    Normalized,
    Running,
    Update,
    sum_of_weights,
    values_per_channel,
)
from batchnorm.kernels.correction import Renormalization
from batchnorm.moments import SEVERAL, Moments, divisor_of
from batchnorm.torch_state import is_fake, transforms_active

name = "eager"
fuses = True


def status() -> str:
    return "torch's operators, for every call"


def refuses(x: Tensor, epilogue: Epilogue, plain: bool = True) -> str | None:  # noqa: ARG001 (the contract's signature)
    """Never: this kernel is the last one."""
    return None


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    count: int | Tensor = values_per_channel(x)
    if mask is not None:
        count = mask.expand(x.shape[0], 1, *x.shape[2:]).sum(dtype=wide_dtype(x))
        if _can_gather(x):
            x, mask = _gathered(x, mask), None
    wide, axes = _masked(x.to(wide_dtype(x)), mask), _reduced_axes(x)
    divisor = divisor_of(count)
    mean = wide.sum(axes) / divisor  # (C,)
    deviation = _masked(wide - _along_channels(mean, x), mask)
    if x.dtype == wide.dtype:
        correction = deviation.sum(axes) / divisor
        mean = mean + correction
        deviation = _masked(deviation - _along_channels(correction, x), mask)
    return Moments(count, mean, deviation.square().sum(axes))


def weighted_moments(x: Tensor, sample_weights: Tensor) -> Moments:
    wide, axes = x.to(wide_dtype(x)), _reduced_axes(x)
    # A product with 0 would let NaN through; and where x is finite, this one's derivative by the weight is not 0.
    wide = torch.where((sample_weights == 0) & ~wide.isfinite(), 0, wide)
    count = sum_of_weights(x, sample_weights)
    divisor = divisor_of(count)
    mean = (sample_weights * wide).sum(axes) / divisor  # (C,)
    deviation = wide - _along_channels(mean, x)
    if x.dtype == wide.dtype:
        correction = (sample_weights * deviation).sum(axes) / divisor
        mean = mean + correction
        deviation = deviation - _along_channels(correction, x)
    return Moments(count, mean, (sample_weights * deviation.square()).sum(axes))


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
    z = _pre_activation(_normalized(x, mean, rstd, epilogue.mask), epilogue)
    y = z if epilogue.activation is None else epilogue.activation(z)
    return _masked(y, epilogue.mask).to(x.dtype)


def infer(
    x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(x)
    # A copy even if the dtype is wide already: the caller's buffers may be updated before the backward.
    mean, rstd = running_mean.detach().to(wide, copy=True), (running_var.detach().to(wide) + eps).rsqrt()
    return normalize(x, mean, rstd, epilogue), mean, rstd


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    return _reduce(*_pre_activation_grad(dy, x, mean, rstd, epilogue), epilogue.mask)


def input_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    mean_grads: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    grad, normalized = _pre_activation_grad(dy, x, mean, rstd, epilogue)
    return _input_grad(x, grad, normalized, rstd, epilogue, mean_grads)


def forward(x: Tensor, eps: float, epilogue: Epilogue, groups: Groups | None = None) -> Forward:
    if groups is not None:
        return forward_groups(x, epilogue, groups, lambda x, epilogue: forward(x, eps, epilogue))
    batch = moments(x, epilogue.mask)
    rstd = batch.rstd(eps)
    return Forward(normalize(x, batch.mean, rstd, epilogue), batch, rstd)


def forward_renormalized(x: Tensor, eps: float, epilogue: Epilogue, renormalization: Renormalization) -> Forward:
    batch = moments(x, epilogue.mask)
    correction, rstd = renormalization.of(batch, eps), batch.rstd(eps)
    return Forward(normalize(x, batch.mean, rstd, epilogue.corrected(correction)), batch, rstd, correction)


def backward(
    dy: Tensor,
    x: Tensor,
    by: Normalized,
    epilogue: Epilogue,
    needs_input_grad: bool = True,
    groups: Groups | None = None,
) -> Backward:
    if groups is not None:

        def of_group(dy: Tensor, x: Tensor, by: Normalized, epilogue: Epilogue) -> Backward:
            return backward(dy, x, by, epilogue, needs_input_grad)

        return backward_groups(dy, x, by, epilogue, groups, of_group)
    mean, rstd, count, _ = by
    grad, normalized = _pre_activation_grad(dy, x, mean, rstd, epilogue)
    sums = _reduce(grad, normalized, epilogue.mask)
    if not needs_input_grad:
        return Backward(None, _residual_grad(grad, epilogue), *sums)
    mean_grads = None if count is None else (sums[0] / divisor_of(count), sums[1] / divisor_of(count))
    return Backward(*_input_grad(x, grad, normalized, rstd, epilogue, mean_grads), *sums)


def takes_update(running: Running, moments: Moments, update: Update) -> bool:  # noqa: ARG001 (the contract's signature)
    """Always."""
    return True


@torch.no_grad()
def update_running(running: Running, moments: Moments, update: Update) -> Tensor | None:
    happens = None if isinstance(moments.count, int) else moments.count > SEVERAL
    return buffers.update_statistics(running, moments.mean, moments.variance(unbiased=update.unbiased), update, happens)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype statistics are accumulated in: float64, or float32 on a device that has nothing wider."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor, mask: Tensor | None) -> Tensor:
    """x̂ in the wide dtype, 0 where masked."""
    return _masked(x.to(mean.dtype) - _along_channels(mean, x), mask) * _along_channels(rstd, x)


def _pre_activation(normalized: Tensor, epilogue: Epilogue) -> Tensor:
    """z = weight · x̂ + bias + residual, in the wide dtype."""
    z = normalized
    if epilogue.weight is not None:
        z = z * _along_channels(epilogue.weight, z)
    if epilogue.bias is not None:
        z = z + _along_channels(epilogue.bias, z)
    if epilogue.residual is not None:
        z = z + _masked(epilogue.residual.to(z.dtype), epilogue.mask)
    return z


def _pre_activation_grad(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue
) -> tuple[Tensor, Tensor]:
    """g = dy · activation'(z) and x̂, both in the wide dtype, 0 where masked."""
    normalized = _normalized(x, mean, rstd, epilogue.mask)
    grad = _in_layout_of(x, dy).to(mean.dtype)
    if epilogue.activation is not None:
        output = epilogue.output
        z = _pre_activation(normalized, epilogue) if output is None else output.to(grad.dtype)
        grad = grad * epilogue.activation.derivative(z)
    return _masked(grad, epilogue.mask), normalized


def _in_layout_of(x: Tensor, dy: Tensor) -> Tensor:
    """dy with x's strides: an expanded or permuted gradient would give dx a layout of its own.

    Out of place, since dy may be a batch of gradients (`is_grads_batched`), which cannot be written into one.
    """
    if torch.compiler.is_compiling() or dy.stride() == x.stride():
        return dy
    return torch.zeros_like(x, dtype=dy.dtype) + dy


def _reduce(grad: Tensor, normalized: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is not None and _can_gather(grad):
        grad, normalized = _gathered(grad, mask), _gathered(normalized, mask)
    axes = _reduced_axes(grad)
    return grad.sum(axes), (grad * normalized).sum(axes)


def forward_groups(
    x: Tensor, epilogue: Epilogue, groups: Groups, of_group: Callable[[Tensor, Epilogue], Forward]
) -> Forward:
    """The results of `of_group` for x and the epilogue of each group, as those of one call."""
    found = [of_group(x[cut], _of_group(epilogue, x, cut)) for cut in _cuts(groups, x)]
    counts = [torch.as_tensor(batch.count, dtype=batch.mean.dtype, device=x.device) for _, batch, *_ in found]
    means, m2s = (
        torch.stack(values) for values in zip(*((batch.mean, batch.m2) for _, batch, *_ in found), strict=True)
    )
    y = _in_layout_of(x, torch.cat([y for y, *_ in found]))
    return Forward(y, Moments(torch.stack(counts), means, m2s), torch.stack([rstd for _, _, rstd, *_ in found]))


def backward_groups(
    dy: Tensor,
    x: Tensor,
    by: Normalized,
    epilogue: Epilogue,
    groups: Groups,
    of_group: Callable[[Tensor, Tensor, Normalized, Epilogue], Backward],
) -> Backward:
    """The results of `of_group` for dy, x, the statistics and the epilogue of each group, as those of one call."""
    means, rstds, counts, _ = by
    assert isinstance(counts, Tensor), "of groups the counts are (G,)"
    found = [
        of_group(dy[cut], x[cut], Normalized(mean, rstd, count), _of_group(epilogue, x, cut))
        for cut, mean, rstd, count in zip(_cuts(groups, x), means, rstds, counts, strict=True)
    ]
    dx, dresidual = (
        None if values[0] is None else _in_layout_of(x, torch.cat(values))  # pyright: ignore[reportArgumentType]
        for values in ([grads.input for grads in found], [grads.residual for grads in found])
    )
    sums = (torch.stack(values) for values in zip(*(grads[2:] for grads in found), strict=True))
    return Backward(dx, dresidual, *sums)


def _cuts(groups: Groups, x: Tensor) -> list[slice]:
    return [slice(*bounds) for bounds in groups.bounds(x.shape[0])]


def _of_group(epilogue: Epilogue, x: Tensor, cut: slice) -> Epilogue:
    beside = (epilogue.residual, epilogue.mask, epilogue.output, epilogue.sample_weights)
    residual, mask, output, weights = (
        None if value is None else value.expand(x.shape[0], *value.shape[1:])[cut] for value in beside
    )
    return epilogue._replace(residual=residual, mask=mask, output=output, sample_weights=weights)


def _can_gather(x: Tensor) -> bool:
    """Whether the values that a mask counts can be taken out: how many there are must be known at once."""
    if x.is_meta or torch.compiler.is_compiling() or transforms_active():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing()) and not is_fake(x)


def _gathered(value: Tensor, mask: Tensor) -> Tensor:
    """The counted values side by side, (M, C): the order in which they are added depends on nothing else."""
    return value.movedim(1, -1)[mask.expand(value.shape[0], 1, *value.shape[2:]).squeeze(1)]


def _input_grad(
    x: Tensor,
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    mean_grads: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    scale = rstd if epilogue.weight is None else rstd * epilogue.weight.to(rstd.dtype)
    centered = grad
    if mean_grads is not None:
        mean_grad, mean_grad_xhat = (_along_channels(value, x) for value in mean_grads)
        weights = epilogue.sample_weights
        if weights is None:
            centered = grad - mean_grad - normalized * mean_grad_xhat
        else:
            centered = grad - weights * (mean_grad + normalized * mean_grad_xhat)
    dx = _masked(centered * _along_channels(scale, x), epilogue.mask).to(x.dtype)
    return dx, _residual_grad(grad, epilogue)


def _residual_grad(grad: Tensor, epilogue: Epilogue) -> Tensor | None:
    like = epilogue.residual if epilogue.residual is not None else epilogue.output
    return None if like is None else grad.to(like.dtype)


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    """`where`, not a product: 0 · NaN is NaN, and padding may hold anything."""
    return value if mask is None else torch.where(mask, value, 0)


def _reduced_axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _along_channels(channel_values: Tensor, x: Tensor) -> Tensor:
    """(C,) as (C, 1, ..., 1), to broadcast along axis 1 of x."""
    return channel_values.to(wide_dtype(x)).view(-1, *[1] * (x.dim() - 2))
