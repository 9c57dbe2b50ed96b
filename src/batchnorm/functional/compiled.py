"""Calls in compiled code: torch's own operator, which a compiler fuses with its neighbors, and as few Python objects as possible.

Compiled code checks at each call every object that was read while it was traced; a frame less is a microsecond less.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.functional.recompute import recomputing_now
from batchnorm.kernels import Activation, Running, Update
from batchnorm.torch_state import compiler_is_loaded, differentiated_by_torch


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

    As `kernels.aten`, it has torch's operator compute the unbiased variance from running statistics of zeros, with momentum 1.
    """
    if _is_beyond(x, weight, bias, running.mean, running.variance) or not eps > 0.0:
        return None
    count = x.numel() // x.shape[1]
    if count < 2:
        return None
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean, variance = (torch.zeros(x.shape[1], dtype=wide, device=x.device) for _ in "12")
    y = F.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps)
    with torch.no_grad():
        if not update.unbiased:
            variance = variance * ((count - 1) / count)
        _update(running, mean, variance, update, recomputing_now(mean))
    return y if activation is None else activation(y)


def _update(running: Running, mean: Tensor, variance: Tensor, update: Update, recomputed: Tensor) -> None:
    happens = ~recomputed
    if update.skip_nonfinite:
        finite = (mean.to(running.mean.dtype).isfinite() & variance.to(running.variance.dtype).isfinite()).all()
        happens = happens & finite
        if running.skipped is not None:
            running.skipped.add_(~finite & ~recomputed)
    for buffer, value in ((running.mean, mean), (running.variance, variance)):
        old = buffer.to(value.dtype)
        buffer.copy_(torch.where(happens, (1 - update.momentum) * old + update.momentum * value, old))
    if running.batches is not None:
        running.batches.add_(happens)


def infer(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: Activation | None, running: Running
) -> Tensor | None:
    """y by running statistics; None if the call takes the general path."""
    if _is_beyond(x, weight, bias, running.mean, running.variance) or not eps >= 0.0:
        return None
    if {running.mean.dtype, running.variance.dtype} - {x.dtype, torch.float32}:
        return None
    y = F.batch_norm(x, running.mean.detach(), running.variance.detach(), weight, bias, False, 0.0, eps)
    return y if activation is None else activation(y)


def _is_beyond(x: Tensor, weight: Tensor | None, bias: Tensor | None, *running: Tensor) -> bool:
    """Whether torch's operator does not take these, or a transform of `torch.func` is active, or they do not fit and must raise."""
    if type(x) is not Tensor or x.dim() < 2 or not x.is_floating_point() or differentiated_by_torch():
        return True
    half = x.dtype is torch.bfloat16 or x.dtype is torch.float16
    for values in (weight, bias, *running):
        if values is not None and (values.dim() != 1 or values.shape[0] != x.shape[1] or values.is_complex()):
            return True
    # Beside half-precision input torch computes in the parameters' dtype: half-precision parameters would round the statistics.
    return any(
        values is not None and values.dtype is not (torch.float32 if half else x.dtype) for values in (weight, bias)
    )


def eager() -> Any:
    """A context in which compiled code runs uncompiled: compiled code ignores hooks added later, and cannot wait for other threads."""
    if not compiler_is_loaded():
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
