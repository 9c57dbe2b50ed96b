"""The fast path of a layer's call: one operator forward, one backward, and as few Python frames around them as possible.

On a tensor of a few kilobytes the frames are most of what a layer costs. Calls with anything unusual take the general path, with the
same bits as the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import kernels, memory
from batchnorm.functional.autograd import Normalize, StepCall
from batchnorm.functional.checks import is_like
from batchnorm.functional.recompute import recomputing
from batchnorm.kernels import Activation, Step, Steps
from batchnorm.torch_state import differentiated_by_torch, is_tracing, unseen_by_checkpoints

# The values of the largest x whose step a node of torch's own records. That takes less time than one in Python, but computes dx whether it
# is wanted or not, and copies a dy that is not planar.
MOST_IN_TORCHS_NODE = 2**17


def steps_for(x: Tensor, running_mean: Tensor) -> Steps | None:
    """The one-operator calls for x, or None if this call takes the general path."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or is_tracing() or differentiated_by_torch():
        return None
    if memory.thread.saver is not None and memory.saving():
        return None
    return kernels.steps_for(x, running_mean)


def call(
    step: Step,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation | None,
    running: tuple[Any, ...],
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor | None:
    """y, or None if the operator does not take the call; then nothing was written.

    Args:
        step: one of `steps_for`.
        x: (N, C, *S).
        weight: gamma, (C,).
        bias: beta, (C,).
        residual: added before the activation, like x.
        activation: applied last.
        running: the layer's buffers, how a batch updates them, and eps last, in the order of the operator's schema.
        observe: receives the batch's statistics if no gradient is recorded.
    """
    if not step.constant_statistics and recomputing():
        # A checkpoint expects the same tensors to be saved, so the recomputation takes the same path; it writes copies of the buffers.
        with unseen_by_checkpoints():
            running = tuple(value.clone() if isinstance(value, Tensor) else value for value in running)
    code = step.activation_code(activation)
    if code is None or (residual is not None and not is_like(residual, x)):
        return None
    arguments = (*running, *code)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if (
            step.in_torchs_node is not None
            and activation is None
            and residual is None
            and weight is not None
            and x.requires_grad
            and x.numel() <= MOST_IN_TORCHS_NODE
            and x.is_contiguous()
        ):
            y = step.in_torchs_node(x, weight, bias, running)
            if y is not None:
                return y
        return _apply(x, weight, bias, residual, _new(StepCall, (step, arguments, code, running[-1], activation)))
    y, statistics = step.forward(x, weight, bias, residual, *arguments)
    if not y.numel():
        return None
    if observe is not None:
        observe(statistics)
    return y


_new = tuple.__new__  # of a named tuple, without its frame

# `Normalize.apply` without its two frames for `torch.func`, which takes the general path: they cost as much as a kernel.
_apply = super(torch.autograd.Function, Normalize).apply  # pyright: ignore[reportAttributeAccessIssue]
