"""The gradients of one batch, and what happens to running statistics in the backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.diagnostics.norms import Norm
from batchnorm.diagnostics.record import in_training
from batchnorm.diagnostics.step import copies, differ
from batchnorm.torch_state import graph_task


@dataclass
class Gradients:
    """Gradients of one batch in training mode.

    Attributes:
        parameters: by name.
        outputs: norm of the gradient at the output of each batch norm, in float64, in the order of calls.
        in_backward: by layer, calls within the backward that changed running statistics.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    in_backward: dict[str, int] = field(default_factory=dict)


def euclidean_norm(values: Tensor) -> float:
    """The Euclidean norm in float64: in float32 the square of a number under 1e-23 is 0, and so is the norm of a vanishing gradient."""
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64))


def gradients_of(
    model: nn.Module, inside: nn.Module, norms: Iterable[Norm], loss_of_batch: Callable[[], Tensor]
) -> Gradients:
    """Run a forward and a backward in training mode. Gradients and buffers change; the caller restores them.

    Args:
        model: gives the parameters their names.
        inside: the module in its wrappers that runs.
        norms: its layers.
        loss_of_batch: runs it.
    """
    found, values = Gradients(), dict[str, Any]()

    def before(norm: Norm) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: Any) -> None:
            if graph_task() != -1:
                values[norm.name] = copies(norm)

        return hook

    def after(norm: Norm) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: Any, output: Any) -> None:  # also if a checkpoint stops the call early
            if graph_task() != -1:
                if differ(values.get(norm.name), norm.statistics()):
                    found.in_backward[norm.name] = found.in_backward.get(norm.name, 0) + 1
            elif isinstance(output, Tensor) and output.requires_grad:
                found.outputs.setdefault(norm.name, 0.0)
                output.register_hook(lambda grad: found.outputs.__setitem__(norm.name, euclidean_norm(grad)))

        return hook

    with in_training(inside), torch.enable_grad(), contextlib.ExitStack() as stack:
        for value in inside.parameters():
            value.grad = None
        for norm in norms:
            stack.callback(norm.module.register_forward_pre_hook(before(norm)).remove)
            stack.callback(norm.module.register_forward_hook(after(norm), always_call=True).remove)
        loss = loss_of_batch()
        if loss.requires_grad:
            loss.backward()
            found.parameters = {
                name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
            }
    return found
