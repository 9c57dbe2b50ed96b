"""Turns batch norms into layers that do not use the batch, and back.

A layer changes its class and stays the same object, with its weight, bias and hooks. What only a batch norm has (running statistics,
momentum, options) waits in a module that the layer holds, without being its submodule, until `revert` puts it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.errors import ArgumentError, InputError
from batchnorm.kernels import Activation
from batchnorm.layers import OPTIONS, BatchNorm
from batchnorm.layers.state import LEARNED_BY_SOURCES
from batchnorm.logs import logger
from batchnorm.statistics import Running
from batchnorm.surgery.classes import become, remade
from batchnorm.surgery.held import HeldInInference
from batchnorm.surgery.subclasses import WithRest, mapped
from batchnorm.surgery.walker import Slot, norms_of, sequential_pairs

To = Literal["group", "layer", "instance", "none"]
MOST_GROUPS = 32  # Wu & He 2018, table 3
_BEFORE = "_batch_norm_before"
_OF_BATCH_NORM = (  # attributes that the alternatives do not have
    *("num_features", "momentum", "track_running_stats", "process_group", "keep_wide_statistics"),
    *("_nonfinite_batches", "_dtypes_before_conversion", "_statistics_before_conversion", *OPTIONS),
)
_BUFFERS = ("running_", "num_batches_tracked")  # what their names begin with
_OF_INSTANCE_NORM = ("running_mean", "running_var", "num_batches_tracked")  # buffers that its forward asks for
_INSTANCE: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: nn.InstanceNorm1d,
    nn.BatchNorm2d: nn.InstanceNorm2d,
    nn.BatchNorm3d: nn.InstanceNorm3d,
}


class Affine(nn.Module):
    """What is left of a batch norm without its statistics: weight · x + bias, for each channel on `channel_axis`."""

    weight: Tensor | None
    bias: Tensor | None
    channel_axis: int

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, *S) -> (N, C, *S)."""
        y = input.movedim(self.channel_axis, -1)
        y = y if self.weight is None else y * self.weight
        y = y if self.bias is None else y + self.bias
        return y.movedim(-1, self.channel_axis)


class _Before(NamedTuple):
    """What `restore` needs: the batch norm without its parameters, the class name and the dtype of the layer that it became."""

    norm: Any
    became: str
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Alternative:
    """What batch norms become.

    Args:
        to: which normalization.
        channels_per_group: the fewest channels in a group of "group".

    Raises:
        InputError: if there is no such normalization, or a group has fewer than two channels.
        ArgumentError: if channels_per_group is not an integer.
    """

    to: To
    channels_per_group: int = 8

    def __post_init__(self) -> None:
        if self.to not in get_args(To):
            raise InputError(f"to must be one of {', '.join(map(repr, get_args(To)))}, but got {self.to!r}")
        if not isinstance(self.channels_per_group, int):
            raise ArgumentError(f"channels_per_group must be an int, but got {type(self.channels_per_group).__name__}")
        if self.channels_per_group < 2:
            raise InputError(
                f"channels_per_group must be at least 2, but got {self.channels_per_group}; groups of one channel are to='instance'"
            )

    def choices(
        self, slots: list[Slot], ours: Callable[[nn.Module], type[nn.Module] | str]
    ) -> Iterator[tuple[nn.Module, str, type[nn.Module] | str]]:
        """Each batch norm once, its paths, and its new class, or the reason why it has none; `ours` is the class `convert` gives it."""
        along_sequences = {
            id(after.module)
            for before, after in sequential_pairs(slots)
            if isinstance(before.module, nn.Conv1d | nn.ConvTranspose1d)
        }
        for layer, paths in norms_of(slots):
            found = _why_not(layer)
            cls = type(layer) if found or isinstance(layer, BatchNorm) else ours(layer)
            if found or isinstance(cls, str):
                yield layer, paths, found or cls
                continue
            assert isinstance(layer, _BatchNorm)
            base = self._base(layer, id(layer) in along_sequences)
            activation = getattr(layer, "activation", None) or getattr(cls, "activation", None)
            rest = getattr(cls, "rest", ()) if issubclass(cls, WithRest) else ()
            follows = isinstance(base, str) or not (rest or activation)
            yield layer, paths, base if follows else _followed(base, rest, activation)

    def replace(self, layer: nn.Module, cls: type[nn.Module]) -> None:
        """Turn a batch norm into `cls`, which `choices` found for it."""
        assert isinstance(layer, _BatchNorm)
        axis, C = getattr(layer, "channel_axis", 1), layer.num_features
        before = object.__new__(type(layer))
        moved = {name: layer.__dict__.pop(name) for name in _OF_BATCH_NORM if name in layer.__dict__}
        empty = {name: type(value)() for name, value in vars(layer).items() if isinstance(value, dict)}
        buffers = {name: layer._buffers.pop(name) for name in [*layer._buffers] if name.startswith(_BUFFERS)}
        learned = {
            name: layer._parameters.pop(name) for name in [*layer._parameters] if name.startswith(LEARNED_BY_SOURCES)
        }
        before.__dict__ |= {**empty, "training": layer.training, **moved, "_buffers": buffers, "_parameters": learned}
        dtype = None if layer.weight is None else layer.weight.dtype
        become(layer, mapped(type(layer), lambda _: cls))
        layer.__dict__[_BEFORE] = _Before(before, type(layer).__name__, dtype)
        layer.__dict__ |= _attributes(layer, self.groups(C), C, axis)
        if issubclass(cls, _InstanceNorm):
            layer._buffers |= dict.fromkeys(_OF_INSTANCE_NORM)

    def groups(self, channels: int) -> int:
        """The number of groups: the largest divisor of the channels, up to 32, whose groups are large enough; 0 if none is."""
        if self.to == "layer":
            return 1
        allowed = (
            groups
            for groups in range(MOST_GROUPS, 0, -1)
            if channels % groups == 0 and channels // groups >= self.channels_per_group
        )
        return next(allowed, 0)

    def _base(self, layer: _BatchNorm, along_sequence: bool) -> type[nn.Module] | str:
        """Torch's class, or ours, without what follows the normalization."""
        axis, C = getattr(layer, "channel_axis", 1), layer.num_features
        if self.to == "none":
            return nn.Identity if layer.weight is None and layer.bias is None else Affine
        if self.to == "layer" and axis == -1 and C > 1:
            return nn.LayerNorm
        if axis != 1:
            return f"its channels are on axis {axis}, and torch's {self.to} norm takes them on axis 1"
        has_places = along_sequence or isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d)
        if self.to == "instance":
            if not has_places:
                return "it may get input of shape (N, C), where an instance of a channel is one value, and nothing of it would be left"
            return next(ours for torchs, ours in _INSTANCE.items() if isinstance(layer, torchs))
        if C == 1 and not has_places:
            return "it has one channel and may get input of shape (N, 1), of which nothing would be left"
        if not self.groups(C):
            return (
                f"it has {C} channels, fewer than a group of {self.channels_per_group}; pass a smaller channels_per_group, "
                "or to='layer'"
            )
        return nn.GroupNorm


def restore(slots: list[Slot]) -> None:
    """Turn the layers of `Alternative.replace` back into the batch norms that they were."""
    for slot in slots:
        layer, held = slot.module, slot.module.__dict__.get(_BEFORE)
        if held is None:
            continue
        if type(layer).__name__ != held.became:
            logger.warning(
                "revert: left %s: its class became %s after the conversion; undo that first",
                slot.path,
                type(layer).__name__,
            )
            continue
        del layer.__dict__[_BEFORE]
        before: Any = held.norm
        weight = getattr(layer, "weight", None)
        if weight is not None:  # the model may have been moved or cast
            before.to(device=weight.device, dtype=None if weight.dtype == held.dtype else weight.dtype)
        for name in _attributes(layer, 1, 1, 1):
            layer.__dict__.pop(name)
        become(layer, type(before))
        layer._buffers |= before._buffers
        layer._parameters |= before._parameters
        layer.__dict__ |= {name: before.__dict__[name] for name in _OF_BATCH_NORM if name in before.__dict__}
        logger.info("revert: %s is a batch norm again", slot.path or "the model")


def _why_not(layer: nn.Module) -> str | None:
    """Why a layer does not change, whatever it should become; None for layers that may."""
    if not isinstance(layer, _BatchNorm):
        return "it is frozen, so it does not depend on the batch"
    if isinstance(layer, HeldInInference) or isinstance(getattr(layer, "statistics", None), Running):
        return "it is frozen, so it does not depend on the batch; call batchnorm.unfreeze first to replace it"
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():  # pyright: ignore[reportAttributeAccessIssue]
        return "it is still lazy; call the model once first"
    if any(value.is_complex() for value in (*layer.parameters(), *layer.buffers())):
        return "it is complex, and torch's alternatives are not"
    return None


def _attributes(layer: nn.Module, groups: int, channels: int, axis: int) -> dict[str, Any]:
    """The attributes of a layer's class that its constructor would set, without those that batch norms have too."""
    if isinstance(layer, nn.GroupNorm):
        return {"num_groups": groups, "num_channels": channels}
    if isinstance(layer, nn.LayerNorm):
        return {"normalized_shape": (channels,), "elementwise_affine": layer.weight is not None}
    if isinstance(layer, Affine):
        return {"channel_axis": axis}
    if isinstance(layer, nn.Identity):
        return {}
    return {"num_features": channels, "momentum": 0.1, "track_running_stats": False}  # InstanceNorm


@remade
def _followed(base: type[nn.Module], children: tuple[str, ...], activation: Activation | None) -> type[nn.Module]:
    """The class of layers that call their submodules, or an activation, after `base`."""
    forward: Any = base.forward

    def normalize_and_go_on(self: Any, input: Tensor) -> Tensor:
        y = forward(self, input)
        for name in children:
            y = getattr(self, name)(y)
        return y if activation is None else activation(y)

    cls: Any = type(base.__name__, (base,), {"forward": normalize_and_go_on, "__module__": base.__module__})
    return cls
