"""Calls of torch's own operator, whose backward is torch's too: on GPUs, and on a CPU without the C++ library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_tensor
from torch.nn import functional as F

from batchnorm import kernels, memory
from batchnorm.functional.autograd import exporting
from batchnorm.functional.checks import is_like
from batchnorm.functional.recompute import recomputing
from batchnorm.kernels import Activation, Epilogue, Running, Update, aten, buffers
from batchnorm.torch_state import differentiated_by_torch, is_tracing, saved_tensors_hooks


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None,
    running: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    update: tuple[float | Tensor, bool, bool],
    residual: Tensor | None = None,
) -> Tensor | None:
    """y in training, with the running statistics updated as `Kernel.update_running` does; None if the call takes the general path.

    `running` has the fields of `Running`, and `update` the first three of `Update`: a small x feels what it takes to name them.
    """
    if (residual is not None and not is_like(residual, x)) or saved_tensors_hooks() is not None:
        return None  # a recomputation has hooks too, and must call and save the same
    train = _train_on_cpu if x.is_cpu else _train_on_device
    y = train(x, weight, bias, eps, running, update)
    return None if y is None else _finished(y, residual, activation)


def _finished(y: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
    """activation(y + residual), in the memory of y: a tensor that the first write fills costs more than the arithmetic."""
    if residual is not None:
        y = y.add_(residual)
    return y if activation is None else activation.overwriting(y)


def _train_on_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: tuple[Any, ...], update: tuple[Any, ...]
) -> Tensor | None:
    """Torch updates the running statistics. If the variance is not finite then, they are put back, and the general path takes the call.

    A mean beyond the dtype of the statistics comes with such a variance. They are put back without a new version: an earlier graph holds
    them, but does not use them. A small x feels each operation, so one at most copies both, and the fastest that sees all variances looks.
    """
    (mean, variance, batches, _), (momentum, unbiased, skip_nonfinite) = running, update
    if not (unbiased and isinstance(momentum, float) and _fits_cpu(x, weight, bias, mean, variance)):
        return None
    if not eps > 0.0 or x.numel() <= x.shape[1]:
        return None
    if recomputing():
        return _by_torch(x, weight, bias, mean.clone(), variance.clone(), True, momentum, eps)
    before = _copied(mean, variance) if skip_nonfinite else None
    y = _by_torch(x, weight, bias, mean, variance, True, momentum, eps)
    if y is None:
        return None
    if before is not None and not _is_finite(variance):
        saved = torch.as_tensor(before, dtype=mean.dtype).view(2, -1)
        mean.data.copy_(saved[0])
        variance.data.copy_(saved[1])
        return None
    if batches is not None:
        batches.add_(1)
    return y


def _copied(mean: Tensor, variance: Tensor) -> Tensor | list[float]:
    """The values of both, one after the other."""
    if mean.shape[0] <= _FEW:
        return mean.tolist() + variance.tolist()
    return torch.cat((mean, variance))


def _is_finite(variance: Tensor) -> bool:
    """Whether all these values, none negative, are finite."""
    return math.isfinite(sum(variance.tolist()) if variance.shape[0] <= _FEW else variance.max().item())


def _by_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor | None:
    """Torch's operator; None for sizes that do not fit, which the general path names."""
    try:
        return torch.batch_norm(x, weight, bias, mean, variance, training, momentum, eps, False)
    except RuntimeError:
        return None


def _train_on_device(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: tuple[Any, ...], update: tuple[Any, ...]
) -> Tensor | None:
    """Torch's operator computes the statistics of the batch, as in `kernels.aten`; the running ones are updated by them."""
    if _is_beyond(x, weight, bias, running[0], running[1]) or not eps > 0.0:
        return None
    if x.numel() < 2 * x.shape[1]:
        return None
    zeros = torch.zeros(2, x.shape[1], dtype=WIDE[x.dtype], device=x.device).unbind()
    return train_and_update(x, weight, bias, eps, zeros, Running(*running), None if recomputing() else Update(*update))


def train_and_update(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    zeros: Sequence[Tensor],
    running: Running,
    update: Update | None,
) -> Tensor:
    """y by torch's operator, which writes the batch's statistics over `zeros`; they update the running ones unless `update` is None."""
    count = x.numel() // x.shape[1]
    mean, variance = zeros
    y = torch.batch_norm(x, weight, bias, mean, variance, True, 1.0, eps, torch.backends.cudnn.enabled)
    if update is not None:
        with torch.no_grad():
            variance = variance if update.unbiased else variance * ((count - 1) / count)
            buffers.update_statistics(running, mean, variance, update)
    return y


def infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None,
    running: tuple[Tensor, Tensor],
    residual: Tensor | None = None,
) -> Tensor | None:
    """y by running statistics; None if the call takes the general path."""
    if (residual is not None and not is_like(residual, x)) or saved_tensors_hooks() is not None:
        return None  # likewise
    infer = _infer_on_cpu if x.is_cpu else _infer_on_device
    y = infer(x, weight, bias, eps, running)
    return None if y is None else _finished(y, residual, activation)


def _infer_on_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: tuple[Tensor, Tensor]
) -> Tensor | None:
    mean, variance = running
    if not _fits_cpu(x, weight, bias, mean, variance) or not eps >= 0.0 or x.numel() == 0 or _saves_in_vain(x, weight):
        return None
    if torch.is_grad_enabled():  # later updates must not change what is saved for backward
        mean, variance = mean.clone(), variance.clone()
    return _by_torch(x, weight, bias, mean, variance, False, 0.0, eps)


def _infer_on_device(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, running: tuple[Tensor, Tensor]
) -> Tensor | None:
    mean, variance = running
    if _is_beyond(x, weight, bias, mean, variance) or not eps >= 0.0 or x.numel() == 0:
        return None
    if mean.dtype is not variance.dtype or mean.dtype not in (x.dtype, torch.float32):
        return None
    if _saves_in_vain(x, weight):
        return None
    mean, variance = mean.detach(), variance.detach()
    if torch.is_grad_enabled():  # likewise
        mean, variance = mean.clone(), variance.clone()
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)


def accepts(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, residual: Tensor | None
) -> bool:
    """Whether torch's operator accepts these tensors. Beside half-precision input it computes in the parameters' dtype, so half-precision
    parameters would round the statistics.

    Compiled code compares what is read here at each call, and most slowly an object that another module reads too. So dtypes are compared
    by their sizes, and `is_tensor`, a function, stands for the class.
    """
    if x.dim() < 2 or not x.is_floating_point() or x.itemsize < 2 or x.numel() == 0:
        return False
    C, itemsize = x.shape[1], 8 if x.itemsize == 8 else 4
    for values in (weight, bias):
        if values is None:
            continue
        if values.dim() != 1 or values.shape[0] != C or values.itemsize != itemsize or not values.is_floating_point():
            return False
    for values in (mean, variance):
        if values.dim() != 1 or values.shape[0] != C or values.is_complex():
            return False
    if residual is None:
        return True
    alike = is_tensor(residual) and residual.dtype is x.dtype and residual.device == x.device
    return alike and residual.shape == x.shape


def _saves_in_vain(x: Tensor, weight: Tensor | None) -> bool:
    """Whether torch's operator would save a large x for the backward although no gradient depends on it: the general path does not.

    For a small x the general path's calls cost more than the memory is worth.
    """
    learns = weight is not None and weight.requires_grad
    return not learns and x.numel() >= _LARGE and x.requires_grad and torch.is_grad_enabled()


def _fits_cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor) -> bool:
    """Whether torch's operator computes this call, which nothing observes or compiles; in few frames."""
    wide = WIDE.get(x.dtype)
    return (
        "cpu" in aten.DEVICES
        and type(x) is Tensor
        and x.dim() >= 2
        and (weight is None or weight.dtype is wide)
        and (bias is None or bias.dtype is wide)
        and mean.dtype is wide
        and variance.dtype is wide
        and not (differentiated_by_torch() or is_tracing() or (memory.thread.saver is not None and memory.saving()))
        and aten in kernels.KERNELS
    )


_LARGE = 2**16  # values of x
_FEW = 32  # channels, whose values as Python's numbers cost less than an operation of torch

# The dtype in which torch computes, by that of the input.
WIDE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float64: torch.float64,
}


def _is_beyond(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor) -> bool:
    """Whether the call takes the general path: another kernel computes it, torch's operator does not accept it, or it must raise."""
    accepted = type(x) is Tensor and accepts(x, weight, bias, mean, variance, None)
    if not accepted or differentiated_by_torch() or exporting():
        return True
    return memory.saving() or kernels.select(x, Epilogue(weight, bias)) is not aten
