"""Watches what training steps do to the batch norms of a model: modes, updates of running statistics, and when they happen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from batchnorm.diagnostics.norms import Norm
from batchnorm.torch_state import graph_task


@dataclass
class Step:
    """What happened to the layers in training steps.

    Attributes:
        forwards: calls of the model itself.
        steps: steps of optimizers that hold a parameter of the model.
        updates: by layer, calls in a forward that changed running statistics.
        in_backward: by layer, calls within a backward that changed running statistics.
        woken: layers that were handed over in inference mode and ran in training mode.
        moved: layers handed over with a frozen affine whose statistics changed.
    """

    forwards: int = 0
    steps: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    in_backward: dict[str, int] = field(default_factory=dict)
    woken: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watched(model: nn.Module, norms: Sequence[Norm], handed_over: dict[str, bool]) -> Iterator[Step]:
    """Watch the layers in this context; `handed_over` has the mode in which each layer came, True in training mode."""
    found, values = Step(), dict[str, Any]()
    stopped = {norm.name for norm in norms if norm.updates and is_stopped(norm)}

    def before(norm: Norm) -> Callable[..., None]:
        def hook(layer: nn.Module, _args: Any) -> None:
            values[norm.name] = copies(norm)
            woken = layer.training and not norm.frozen and not handed_over.get(norm.name, True)
            if woken and norm.name not in found.woken:
                found.woken.append(norm.name)

        return hook

    def after(norm: Norm) -> Callable[..., None]:
        def hook(_layer: nn.Module, _args: Any, _output: Any) -> None:
            if differ(values.get(norm.name), norm.statistics()):
                counts = found.updates if graph_task() == -1 else found.in_backward
                counts[norm.name] = counts.get(norm.name, 0) + 1
                if norm.name in stopped and norm.name not in found.moved:
                    found.moved.append(norm.name)

        return hook

    def called(_model: nn.Module, _args: Any, _output: Any) -> None:
        found.forwards += 1

    with contextlib.ExitStack() as stack:
        stack.callback(model.register_forward_hook(called).remove)
        for norm in norms:
            stack.callback(norm.module.register_forward_pre_hook(before(norm)).remove)
            stack.callback(norm.module.register_forward_hook(after(norm), always_call=True).remove)
        yield found


@contextlib.contextmanager
def counting_steps(model: nn.Module, found: Step) -> Iterator[None]:
    """Count the steps of optimizers that hold a parameter of the model."""
    parameters = {id(value) for value in model.parameters()}

    def stepping(optimizer: Optimizer, *_: Any) -> None:
        found.steps += holds(optimizer, parameters)

    handle = register_optimizer_step_post_hook(stepping)
    try:
        yield
    finally:
        handle.remove()


def holds(optimizer: Optimizer, parameters: set[int]) -> bool:
    """Whether an optimizer has one of the parameters, by their ids."""
    return any(id(value) in parameters for group in optimizer.param_groups for value in group["params"])


def is_stopped(norm: Norm) -> bool:
    """Whether a layer has an affine that does not learn."""
    own = list(norm.module.parameters(recurse=False))
    return bool(own) and not any(value.requires_grad for value in own)


def copies(norm: Norm) -> tuple[Tensor, Tensor] | None:
    """Copies of the running statistics."""
    pair = norm.statistics()
    return None if pair is None else (pair[0].clone(), pair[1].clone())


def differ(before: tuple[Tensor, Tensor] | None, after: tuple[Tensor, Tensor] | None) -> bool:
    """Whether values changed, except NaN that stayed NaN; torch's kernels do not raise the version of a buffer."""
    if before is None or after is None:
        return False
    return any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
