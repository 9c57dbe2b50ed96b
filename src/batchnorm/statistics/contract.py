"""What a part is, and what it sees of its layer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from batchnorm.functional import Reducer
from batchnorm.kernels import Activation


class Layer(Protocol):
    """What a part sees of the layer it serves; the names are those of `torch.nn.BatchNorm2d` and of `layers.BatchNorm`."""

    training: bool
    eps: float
    momentum: float | None
    track_running_stats: bool
    activation: Activation | None
    running_variance: str
    on_single: str
    on_nonfinite: str
    reducer: Reducer | None

    @property
    def gamma(self) -> Tensor | None: ...
    @property
    def beta(self) -> Tensor | None: ...

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    num_nonfinite_batches: Tensor | None


class Statistics(Protocol):
    """A source of statistics: normalizes x (N, C, *S) for a layer, and moves the layer's buffers if that is its way."""

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """The layer's output for x, of x's shape and dtype."""
        ...
