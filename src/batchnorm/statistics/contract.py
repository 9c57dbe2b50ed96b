"""What a part is, and what it sees of its layer."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from batchnorm.errors import StateError
from batchnorm.functional import Reducer
from batchnorm.kernels import Activation


class Kept(NamedTuple):
    """A buffer that a part keeps in its layer.

    Attributes:
        like: the buffer of the layer that it begins as a copy of, and is reset to.
        rows: that many copies of it, (rows, C); None for one, (C,) or the counter's ().
        blank: it begins at 0 instead: what it keeps is of another kind, and only its shape and dtype are those of `like`.
    """

    like: str
    rows: int | None = None
    blank: bool = False

    def start(self, source: Tensor) -> Tensor:
        """What the buffer begins as, where `source` is its `like`; perhaps a view of it."""
        values = torch.zeros_like(source) if self.blank else source.detach()
        return values if self.rows is None else values.expand(self.rows, *source.shape)


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

    @property
    def num_nonfinite_batches(self) -> Tensor | None: ...


class Statistics(Protocol):
    """A source of statistics: normalizes x (N, C, *S) for a layer, and moves the layer's buffers if that is its way."""

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """The layer's output for x, of x's shape and dtype."""
        ...


@runtime_checkable
class Keeping(Protocol):
    """A part that keeps buffers of its own in the layer that has it."""

    def kept(self) -> dict[str, Kept]:
        """Their names: `running_...` or `num_batches_tracked_...`, by which checkpoints tell them."""
        ...


def kept_by(part: Statistics) -> dict[str, Kept]:
    """The buffers that a layer has beside its own because of this part."""
    return part.kept() if isinstance(part, Keeping) else {}


def check_kept(layer: Layer, *names: str) -> None:
    """Refuse buffers of a source that have another number of channels than the layer: pruning may have left them behind.

    Raises:
        StateError: naming one.
    """
    mean = layer.running_mean
    for name in names:
        buffer = getattr(layer, name)
        if mean is not None and buffer.shape[-1:] != mean.shape:
            raise StateError(
                f"the buffers of a layer must have the same number of channels, but {name} has {buffer.shape[-1]} and running_mean has "
                f"{mean.numel()}; prune it alike, or assign layer.statistics once more, which begins it anew"
            )


class Applying:
    """A layer as its source sees it in a call that applies an activation which is not the layer's own."""

    def __init__(self, owner: Layer, activation: Activation) -> None:
        self.owner, self.activation = owner, activation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)


def owner_of(layer: Layer) -> Layer:
    """The layer itself: what a source sees of it in `Domains` or `Applying` lives for one call."""
    while not isinstance(layer, nn.Module) and (owner := getattr(layer, "owner", None)) is not None:
        layer = owner
    return layer
