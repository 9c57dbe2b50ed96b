"""How much a prediction for a sample depends on the other samples of its batch, and which layers make it so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.diagnostics import thresholds
from batchnorm.diagnostics.inline import FunctionalNorms
from batchnorm.diagnostics.norms import Norm
from batchnorm.diagnostics.probes import among_others, relative_difference

Predict = Callable[[nn.Module, Any], Any]


def influence_of_mates(
    model: nn.Module,
    norms: Sequence[Norm],
    predict: Predict,
    x: Tensor,
    untouched: Callable[[], contextlib.AbstractContextManager[None]],
) -> tuple[float, list[str]]:
    """The relative change of the first prediction with the other samples, and the names of the layers that used the batch.

    Args:
        model: is passed to `predict`.
        norms: its layers.
        predict: the user's inference.
        x: an input (N, ...).
        untouched: restores the model after each call.
    """
    if len(x) < 2:
        return 0.0, []
    names, outputs = list[str](), list[Tensor]()
    with _noting(norms, names):
        for batch in (x, among_others(x)):
            with untouched(), torch.no_grad():
                torch.manual_seed(0)
                output = next(
                    (value for value in tree_leaves(predict(model, batch)) if isinstance(value, Tensor)), None
                )
            if output is None or not output.dim() or len(output) != len(x):
                return 0.0, []
            outputs.append(output[0].detach().double())
    change = relative_difference(*outputs)
    if change > thresholds.MATES and not names:
        with untouched(), torch.no_grad(), FunctionalNorms(model) as found:
            predict(model, x)
        names = found.names
    return change, names


@contextlib.contextmanager
def _noting(norms: Sequence[Norm], names: list[str]) -> Iterator[None]:
    """Add to `names` the layers that may normalize by the batch."""

    def before(norm: Norm) -> Callable[..., None]:
        def hook(layer: nn.Module, _args: Any) -> None:
            by_batch = (layer.training and not norm.frozen) or norm.statistics() is None
            if (by_batch or norm.kind == "hand-written") and norm.name not in names:
                names.append(norm.name)

        return hook

    with contextlib.ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.module.register_forward_pre_hook(before(norm)).remove)
        yield
