"""Calls of torch's own operator: in compiled code, and on GPUs.

A compiler fuses the operator with its neighbors, and compiled code checks at each call every Python object that was read while it was
traced. So these functions read few, and call the operator itself, whose backward is torch's too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm import kernels, memory
from batchnorm.functional.autograd import exporting
from batchnorm.functional.recompute import recomputing, recomputing_now
from batchnorm.kernels import Activation, Epilogue, Running, Update, buffers
from batchnorm.torch_state import differentiated_by_torch


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None,
    running: Running,
    update: Update,
) -> Tensor | None:
    """y in training, with the running statistics updated as `Kernel.update_running` does; None if the call takes the general path.

    As in `kernels.aten`, torch's operator computes the unbiased variance from running statistics of zeros, with momentum 1.
    """
    if _is_beyond(x, weight, bias, running) or not eps > 0.0:
        return None
    count = x.numel() // x.shape[1]
    if count < 2:
        return None
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    statistics = torch.zeros(2, x.shape[1], dtype=wide, device=x.device)
    mean, variance = statistics[0], statistics[1]
    y = F.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps)
    compiling = torch.compiler.is_compiling()
    if compiling:
        update = update._replace(unless=recomputing_now(mean))
    if compiling or not recomputing():
        with torch.no_grad():
            variance = variance if update.unbiased else variance * ((count - 1) / count)
            buffers.update_statistics(running, mean, variance, update)
    return y if activation is None else activation(y)


def infer(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: Activation | None, running: Running
) -> Tensor | None:
    """y by running statistics; None if the call takes the general path."""
    if _is_beyond(x, weight, bias, running) or not eps >= 0.0 or x.numel() == 0:
        return None
    if running.mean.dtype is not running.variance.dtype or running.mean.dtype not in (x.dtype, torch.float32):
        return None
    mean, variance = running.mean.detach(), running.variance.detach()
    if (
        torch.is_grad_enabled() and not torch.compiler.is_compiling()
    ):  # later updates must not change what is saved for backward
        mean, variance = mean.clone(), variance.clone()
    y = F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
    return y if activation is None else activation(y)


def _is_beyond(x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running) -> bool:
    """Whether the call takes the general path: another kernel computes it, torch's operator does not accept it, or it must raise."""
    if type(x) is not Tensor or x.dim() < 2 or not x.is_floating_point() or differentiated_by_torch() or exporting():
        return True
    # Beside half-precision input torch computes in the parameters' dtype: half-precision parameters would round the statistics.
    dtype = torch.float32 if x.dtype is torch.bfloat16 or x.dtype is torch.float16 else x.dtype
    for values in (weight, bias):
        if values is not None and (values.dim() != 1 or values.shape[0] != x.shape[1] or values.dtype is not dtype):
            return True
    for values in (running.mean, running.variance):
        if values.dim() != 1 or values.shape[0] != x.shape[1] or values.is_complex():
            return True
    if torch.compiler.is_compiling():
        return False
    return memory.saving() or kernels.select(x, Epilogue(weight, bias)) is not kernels.aten
