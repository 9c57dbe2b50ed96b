"""The verbs in plain torch: any device, any dtype, any strides. Last in the list of kernels, and the measure for the others.

Everything is computed in the wide dtype and rounded once at the end. Where x already has that dtype the mean is corrected by the
mean of the deviations (two passes, Neumaier's remark in Chan et al. 1983), so that a large mean does not cost digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.contract import Backward, Epilogue, values_per_channel
from batchnorm.moments import Moments, at_least_one

name = "eager"


def refuses(x: Tensor, epilogue: Epilogue) -> str | None:  # noqa: ARG001 (the contract's signature)
    """Never: what nothing else takes comes here."""
    return None


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    wide, axes = x.to(wide_dtype(x)), _reduced_axes(x)
    if mask is None:
        count: int | Tensor = values_per_channel(x)
    else:
        wide = torch.where(mask, wide, 0)
        count = mask.expand(x.shape[0], 1, *x.shape[2:]).sum(dtype=wide.dtype)
    divisor = at_least_one(count)
    mean = wide.sum(axes) / divisor  # (C,)
    deviation = _masked(wide - _along_channels(mean, x), mask)
    if x.dtype == wide.dtype:
        correction = deviation.sum(axes) / divisor
        mean = mean + correction
        deviation = _masked(deviation - _along_channels(correction, x), mask)
    return Moments(count, mean, deviation.square().sum(axes))


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
    z = _pre_activation(_normalized(x, mean, rstd, epilogue.mask), epilogue)
    y = z if epilogue.activation is None else epilogue.activation(z)
    return _masked(y, epilogue.mask).to(x.dtype)


def infer(
    x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    wide = wide_dtype(x)
    # A copy even where the dtype is wide already: the caller's buffers may move before the backward.
    mean, rstd = running_mean.detach().to(wide, copy=True), (running_var.detach().to(wide) + eps).rsqrt()
    return normalize(x, mean, rstd, epilogue), mean, rstd


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    grad, normalized = _pre_activation_grad(dy, x, mean, rstd, epilogue)
    return _reduce(grad, normalized)


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


def forward(x: Tensor, eps: float, epilogue: Epilogue) -> tuple[Tensor, Moments, Tensor]:
    batch = moments(x, epilogue.mask)
    rstd = batch.rstd(eps)
    return normalize(x, batch.mean, rstd, epilogue), batch, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    count: int | Tensor | None,
    needs_input_grad: bool = True,
) -> Backward:
    grad, normalized = _pre_activation_grad(dy, x, mean, rstd, epilogue)
    sums = _reduce(grad, normalized)
    if not needs_input_grad:
        return Backward(None, _residual_grad(grad, epilogue), *sums)
    mean_grads = None if count is None else (sums[0] / at_least_one(count), sums[1] / at_least_one(count))
    return Backward(*_input_grad(x, grad, normalized, rstd, epilogue, mean_grads), *sums)


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


def _reduce(grad: Tensor, normalized: Tensor) -> tuple[Tensor, Tensor]:
    axes = _reduced_axes(grad)
    return grad.sum(axes), (grad * normalized).sum(axes)


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
        mean_grad, mean_grad_xhat = mean_grads
        centered = grad - _along_channels(mean_grad, x) - normalized * _along_channels(mean_grad_xhat, x)
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
