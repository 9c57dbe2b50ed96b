"""The verbs in Triton, for NVIDIA and AMD GPUs: `programs/` holds the programs, `plans.toml` says which of them computes what, and why.

    x ──partial_sums──▶ pieces ──finish──▶ mean, rstd, M2 (and the running statistics) ──apply──▶ y
    dy, x ──partial_gradient_sums──▶ pieces ──finish_gradient_sums──▶ Σg, Σg·x̂ ──apply_gradient──▶ dx, dresidual

A GPU has no fast float64 for every value, so sums are float32 about a value near the mean, over few tiles, and float64 from there on
(`programs/sums.py`). Nothing is added atomically: results are the same bits from call to call, and on every device.

Nothing here waits for the device or reads a value from it, the first use of a plan on a device aside (`self_check.py`). What goes wrong
with a program costs speed, not the training: `trust.py`. Triton is imported for the first tensor on a GPU.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import eager
from batchnorm.kernels.contract import Running, Steps, Update
from batchnorm.kernels.eager import weighted_moments  # never asked for: `refuses`
from batchnorm.kernels.gpu import dispatch, self_check, trust
from batchnorm.kernels.gpu.dispatch import cut_of, is_traced, launch, left_to_torch, refuses, status, unavailable
from batchnorm.kernels.gpu.steps import are_buffers, steps_of
from batchnorm.kernels.gpu.verbs import (
    backward,
    forward,
    forward_renormalized,
    infer,
    input_grad,
    moments,
    normalize,
    reduce_grad,
)
from batchnorm.moments import Moments
from batchnorm.torch_state import differentiated_by_torch, is_tracing

__all__ = [
    "backward",
    "forward",
    "forward_renormalized",
    "infer",
    "input_grad",
    "moments",
    "normalize",
    "reduce_grad",
    "refuses",
    "status",
    "unavailable",
    "weighted_moments",
]

name = "gpu"
fuses = True

_UPDATE = "running statistics"  # what `trust` calls the program that updates them


def takes_update(running: Running, moments: Moments, update: Update) -> bool:
    """Not while compiling: a compiler fuses plain operators. And not before a plan ran on the device."""
    count, mean, m2 = moments
    return (
        not is_traced(mean)
        and mean.device.type in dispatch.DEVICES
        and unavailable() is None
        and isinstance(update.momentum, float)
        and update.unless is None
        and (isinstance(count, Tensor) or count > 1)
        and all(type(each) is Tensor and each.dtype is torch.float64 and each.is_contiguous() for each in (mean, m2))
        and are_buffers(running, mean, mean.shape[0])
        and not is_tracing()
        and not differentiated_by_torch()
        and trust.any_known_good(mean.device)
        and trust.refusal(_UPDATE, mean.device, partial(self_check.check_update, mean.device)) is None
    )


def update_running(running: Running, moments: Moments, update: Update) -> Tensor | None:
    count, mean, m2 = moments

    def call() -> tuple[Tensor | None]:
        return (launch().update_running(running, mean, m2, count, update),)

    found = trust.attempt(_UPDATE, mean.device, call)
    return eager.update_running(running, moments, update) if found is None else found[0]


def steps_for(x: Tensor, running_mean: Tensor) -> Steps | None:
    if x.device.type not in dispatch.DEVICES or running_mean.device != x.device or unavailable() is not None:
        return None
    return None if left_to_torch(x) is not None or isinstance(cut_of(x), str) else _STEPS


_kernel: Any = sys.modules[__name__]
_STEPS = steps_of(_kernel)
