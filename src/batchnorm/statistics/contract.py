"""The interface between a statistics source and its layer."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from batchnorm.errors import StateError
from batchnorm.functional import Reducer
from batchnorm.kernels import Activation


class SourceBuffer(NamedTuple):
    """A buffer that a statistics source adds to its layer.

    Attributes:
        like: the buffer of the layer whose values it starts with, and is reset to.
        rows: how many copies of these values it holds, (rows, C); None for a single one, (C,), or () for the counter.
        blank: it starts at 0 instead and takes only shape and dtype from `like`, because its values mean something else.
    """

    like: str
    rows: int | None = None
    blank: bool = False

    def start(self, source: Tensor) -> Tensor:
        """The initial value, where `source` is the buffer `like`; may be a view of it."""
        values = torch.zeros_like(source) if self.blank else source.detach()
        return values if self.rows is None else values.expand(self.rows, *source.shape)


class SourceParameter(NamedTuple):
    """A parameter that a statistics source adds to its layer.

    Attributes:
        like: the parameter of the layer whose values it starts with, and is reset to, in its shape; a layer without this one does not
            get the new one either. None is a single number, (1,), since sharding refuses parameters without an axis.
        number: the initial value of a single number.
    """

    like: str | None = None
    number: float = 0.0

    def start(self, source: Tensor) -> Tensor:
        """The initial value; `source` is the parameter `like`, or gives dtype and device of a number. May be a view of it."""
        return source.detach() if self.like is not None else source.new_full((1,), self.number)


class Layer(Protocol):
    """The attributes of a layer that a source reads; named as in `torch.nn.BatchNorm2d` and `layers.BatchNorm`."""

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
    """A statistics source: normalizes x (N, C, *S) for a layer, and may update the layer's buffers.

    A source may also have `layer_buffers` (`HasBuffers`), `layer_parameters` (`HasParameters`), and these attributes, which the functions
    below read:

        frozen: True if training normalizes by the running statistics, and does not update them.
        infers_by_running_statistics: True if inference is an affine function with the layer's running statistics.
        in_domain: a function of the layer that returns a stand-in with the buffers that the source uses now.
        takes_weights: True if the source may be called with `weights` besides, the sample weights of `functional.batch_norm`.
    """

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """The layer's output for x, of x's shape and dtype."""
        ...


@runtime_checkable
class HasBuffers(Protocol):
    """A statistics source that adds buffers to its layer."""

    def layer_buffers(self) -> dict[str, SourceBuffer]:
        """These buffers by name. Names begin with `running_mean_`, `running_var_` or `num_batches_tracked_`; checkpoints rely on it."""
        ...


@runtime_checkable
class HasParameters(Protocol):
    """A statistics source that adds parameters to its layer."""

    def layer_parameters(self) -> dict[str, SourceParameter]:
        """These parameters by name. Names begin with `statistics_`; checkpoints rely on it."""
        ...


def buffers_of(statistics: Statistics) -> dict[str, SourceBuffer]:
    """The buffers that this source adds to a layer, by name."""
    return statistics.layer_buffers() if isinstance(statistics, HasBuffers) else {}


def parameters_of(statistics: Statistics) -> dict[str, SourceParameter]:
    """The parameters that this source adds to a layer, by name."""
    return statistics.layer_parameters() if isinstance(statistics, HasParameters) else {}


def is_frozen(layer: nn.Module) -> bool:
    """Whether the layer normalizes by its running statistics in training too."""
    return getattr(getattr(layer, "statistics", None), "frozen", False)


def takes_weights(statistics: Statistics) -> bool:
    """Whether this source may be called with sample weights."""
    return getattr(statistics, "takes_weights", False)


def infers_by_running_statistics(layer: nn.Module) -> bool:
    """Whether the layer is an affine function with its running statistics in inference, as torch's layers are."""
    statistics = getattr(layer, "statistics", None)
    return statistics is None or getattr(statistics, "infers_by_running_statistics", False)


def in_domain(layer: Any) -> Any:
    """The layer, or a stand-in for it with the buffers that its source uses now."""
    choose = getattr(getattr(layer, "statistics", None), "in_domain", None)
    return layer if choose is None else choose(layer)


def check_buffers(layer: Layer, *names: str) -> None:
    """Check that buffers of a source have the layer's number of channels; pruning may have missed them.

    Raises:
        StateError: naming the first that has not.
    """
    mean = layer.running_mean
    for name in names:
        buffer = getattr(layer, name)
        if mean is not None and buffer.shape[-1:] != mean.shape:
            raise StateError(
                f"the buffers of a layer must have the same number of channels, but {name} has {buffer.shape[-1]} and running_mean has "
                f"{mean.numel()}; prune it too, or assign layer.statistics again to reset it"
            )


class Applying:
    """A layer with another activation, for the source to use in one call."""

    def __init__(self, owner: Layer, activation: Activation) -> None:
        self.owner, self.activation = owner, activation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.owner, name)


def owner_of(layer: Layer) -> Layer:
    """The layer itself, where a source got a stand-in of `Domains` or `Applying`, which exists for one call."""
    while not isinstance(layer, nn.Module) and (owner := getattr(layer, "owner", None)) is not None:
        layer = owner
    return layer


def tensors_of(layer: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None] | None:
    """The layer's weight, bias, running mean, running variance and counter; None if it has no running statistics, or computes these.

    They are read from the module's dictionaries: an attribute look-up of each would cost half a microsecond.
    """
    parameters, buffers = layer._parameters, layer._buffers
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, variance, batches = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # pruned or parametrized: attributes that are computed
        return None
    return None if mean is None or variance is None else (weight, bias, mean, variance, batches)
