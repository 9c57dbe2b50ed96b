"""What hand-written layers do, found by calling each alone with its input of one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.diagnostics import probes
from batchnorm.diagnostics.norms import Norm
from batchnorm.diagnostics.record import in_training, input_of


@dataclass(frozen=True)
class ByHand:
    """What a hand-written layer was seen to do.

    Attributes:
        dependence: how much inference depends on the batch, relative.
        sum_of_dx: |sum of dx| over sum of |dx| in training.
        graphs: the running statistics that hold an autograd graph after a call.
        position_share: of the output's variance, between positions; 0 if each position is normalized on its own.
        statistics: how many means it has if each position is normalized on its own.
        biased: whether the running variance is updated by the biased variance.
    """

    dependence: float
    sum_of_dx: float
    graphs: list[str]
    position_share: float
    statistics: int
    biased: bool


def inputs_of(norms: list[Norm], model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """The first input of each layer that takes nothing else, as given, while `run` calls the model in training mode."""
    inputs = dict[str, Tensor]()
    with torch.no_grad(), contextlib.ExitStack() as stack, in_training(model):
        for norm in norms:

            def keep(_layer: nn.Module, args: Any, kwargs: Any, norm: Norm = norm) -> None:
                if len(args) == 1 and not kwargs and input_of(norm, args, kwargs) is not None:
                    inputs.setdefault(norm.name, args[0].detach().clone())

            stack.callback(norm.module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        run()
    return inputs


def probed(norm: Norm, x: Tensor, untouched: Callable[[], contextlib.AbstractContextManager[None]]) -> ByHand:
    """Call a layer alone; `untouched` restores it after each probe."""

    def ask(probe: Callable[[Norm, Tensor], Any]) -> Any:
        with untouched():
            return probe(norm, x)

    share = ask(probes.position_share)
    return ByHand(
        ask(probes.dependence),
        ask(probes.detachment),
        ask(probes.graph_holders),
        share,
        x[0].numel(),
        ask(probes.updates_by_biased_variance),
    )
