"""Statistics as in the paper: the batch's in training, the running ones in inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.compiler import is_compiling

from batchnorm.statistics.common import by_replicas, infer_on_fast_path, train_on_fast_path, train_or_infer
from batchnorm.statistics.compiled import call_compiled
from batchnorm.statistics.contract import Layer


@dataclass(frozen=True)
class Batch:
    """Batch statistics in training, running statistics in inference (Ioffe & Szegedy 2015, Algorithms 1 and 2).

    A layer without running statistics normalizes by the batch in inference too, as in torch.
    """

    infers_by_running_statistics: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = True

    def __call__(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None = None
    ) -> Tensor:
        if weights is not None:
            return train_or_infer(layer, x, residual, mask, by_replicas, weights=weights)
        if is_compiling():
            y = call_compiled(layer, x, residual, mask, training=layer.training)
        else:
            y = (train_on_fast_path if layer.training else infer_on_fast_path)(layer, x, residual, mask)
        return train_or_infer(layer, x, residual, mask, by_replicas) if y is None else y
