"""Exchanging torch's batch norms for ours in a model, and back, with nothing lost.

A layer is not replaced but changes its class, as torch's lazy layers do: the object stays the same one, so shared modules stay
shared, and parameters, buffers, hooks, the training flag, custom attributes and every reference to the layer are kept because
nothing touches them.

What is planned is planned for the whole model first, and carried out only when the plan stands.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer

from batchnorm.errors import ArgumentError
from batchnorm.kernels import from_module
from batchnorm.layers import STATISTICS, BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.logs import logger

_OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}
_OPTIONS = ("activation", "statistics", "channel_axis", "running_variance", "on_single", "on_nonfinite")
_HARMLESS = (
    "on_single",
    "on_nonfinite",
)  # policies for batches torch refuses or is spoilt by; going back means torch's
_NARROW = "_converted_from_dtype"


class Absorbed(nn.Module):
    """Stands where an activation stood that the batch norm before it now applies; returns its input.

    It keeps the place, so that the names of a Sequential's children and the keys of its state_dict stay, and the original, for
    `revert`.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (
            original,
        )  # in a tuple, so that it is no child: a child would be visited by hooks, apply and repr

    @property
    def original(self) -> nn.Module:
        """The activation that stood here."""
        return self._original[0]

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return repr(self.original)


class Slot(NamedTuple):
    """One place of a model where a module hangs. A module shared by two parents has two slots.

    Attributes:
        path: its name in the model, "" for the root.
        parent: the module it hangs on; None for the root.
        name: its name there.
        module: what hangs there.
    """

    path: str
    parent: nn.Module | None
    name: str
    module: nn.Module

    def hang(self, module: nn.Module) -> None:
        """Hang another module in this place, which is not the root."""
        assert self.parent is not None
        self.parent._modules[self.name] = module


def walk(model: nn.Module) -> Iterator[Slot]:
    """Every slot of a model, parents first, each parent once: shared modules appear in every slot, cycles end."""
    seen: set[int] = set()

    def visit(slot: Slot) -> Iterator[Slot]:
        yield slot
        if id(slot.module) in seen:
            return
        seen.add(id(slot.module))
        for name, child in slot.module._modules.items():  # named_children leaves out a second slot of the same child
            if child is not None:
                yield from visit(Slot(f"{slot.path}.{name}" if slot.path else name, slot.module, name, child))

    yield from visit(Slot("", None, "", model))


def convert(model: nn.Module, *, fuse: bool = True) -> nn.Module:
    """Make every `nn.BatchNorm1d`, `2d` and `3d` of a model ours, in place, and return the model. Lazy ones stay lazy.

    Outputs, gradients, state_dict, parameters and hooks stay what they were; `revert` goes back. Layers of a subclass are left
    alone, since their forward may do anything. What was changed, what was left and why goes to the logger `batchnorm`.

    Args:
        model: changed in place; it may be the layer itself.
        fuse: let a batch norm apply the activation that directly follows it in an `nn.Sequential`, in the same pass. They stay
            apart where somebody could tell the difference: where either has hooks, or the batch norm hangs in several places.

    Raises:
        ArgumentError: if model is not a module.
    """
    slots = _slots(model)
    for layer, paths in _layers(slots):
        if isinstance(layer, BatchNorm):
            continue
        reason = _not_convertible(layer)
        if reason:
            logger.info("convert: left %s: %s", paths, reason)
            continue
        _become(layer, _OURS[type(layer)])
        assert isinstance(layer, BatchNorm)
        statistics = layer.running_mean
        if statistics is not None and statistics.dtype in (torch.float16, torch.bfloat16):
            layer.__dict__[_NARROW] = statistics.dtype
        layer._prepare_buffers()
        logger.info("convert: %s is now batchnorm.%s", paths, type(layer).__name__)
    if fuse:
        _absorb_activations(slots)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Make every layer of ours torch's again, in place, and return the model: the inverse of `convert`, object by object.

    A layer that does what torch's cannot (an activation it was built with, another channel axis, the biased running variance ...)
    is left, and the logger `batchnorm` says so.

    Raises:
        ArgumentError: if model is not a module.
    """
    slots = _slots(model)
    for layer, activation in _sequential_pairs(slots):
        if isinstance(layer.module, BatchNorm) and isinstance(activation.module, Absorbed):
            original = activation.module.original.train(activation.module.training)
            activation.hang(original)
            layer.module.activation = None
    for layer, paths in _layers(slots):
        if not isinstance(layer, BatchNorm):
            continue
        reason = _not_revertible(layer)
        if reason:
            logger.warning("revert: left %s: %s", paths, reason)
            continue
        _narrow_statistics(layer)
        del layer.num_nonfinite_batches
        for name in _OPTIONS:
            layer.__dict__.pop(name, None)
        _become(layer, _TORCHS[type(layer)])
        logger.info("revert: %s is now torch.nn.%s", paths, type(layer).__name__)
    return model


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls


def _slots(model: nn.Module) -> list[Slot]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    return list(walk(model))


def _layers(slots: list[Slot]) -> Iterator[tuple[_BatchNorm, str]]:
    """Each batch norm once, with the paths of all its slots."""
    paths: dict[int, list[str]] = {}
    for slot in slots:
        paths.setdefault(id(slot.module), []).append(slot.path or "the model")
    for module in {id(slot.module): slot.module for slot in slots}.values():
        if isinstance(module, _BatchNorm):
            yield module, ", ".join(paths[id(module)])


def _sequential_pairs(slots: list[Slot]) -> Iterator[tuple[Slot, Slot]]:
    """Neighbours in a plain `nn.Sequential`: the output of the first is the input of the second, and goes nowhere else."""
    for before, after in itertools.pairwise(slot for slot in slots if _is_sequential(slot.parent)):
        if before.parent is after.parent:
            yield before, after


def _is_sequential(parent: nn.Module | None) -> bool:
    return isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward


def _absorb_activations(slots: list[Slot]) -> None:
    places = collections.Counter(id(slot.module) for slot in slots)
    for before, after in _sequential_pairs(slots):
        layer, activation = before.module, from_module(after.module)
        if not isinstance(layer, BatchNorm) or activation is None or layer.activation is not None:
            continue
        if places[id(layer)] > 1 or _has_hooks(layer) or _has_hooks(after.module):
            reason = "the layer hangs in several places" if places[id(layer)] > 1 else "there are hooks between them"
            logger.info("convert: left %s and %s apart: %s", before.path, after.path, reason)
            continue
        layer.activation = activation
        absorbed = Absorbed(after.module).train(after.module.training)
        after.hang(absorbed)
        logger.info("convert: %s now applies %s", before.path, activation)


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    lazy = isinstance(module, LazyModuleMixin)  # whose own pre-hook goes away with its first input
    return any(hooks) and not (lazy and sum(map(len, hooks)) == 1)


def _not_convertible(layer: _BatchNorm) -> str | None:
    if type(layer) not in _OURS:
        return f"it is a {type(layer).__name__}, whose forward may differ"
    taken = [name for name in _OPTIONS if hasattr(layer, name)]
    return f"it has an attribute {taken[0]!r} of its own, which means something else in ours" if taken else None


def _not_revertible(layer: BatchNorm) -> str | None:
    if type(layer) not in _TORCHS:
        return f"torch has no {type(layer).__name__}"
    beyond = [name for name in _OPTIONS if getattr(layer, name) != getattr(BatchNorm, name) and name not in _HARMLESS]
    return f"torch's layer has no {', '.join(beyond)}" if beyond else None


def _narrow_statistics(layer: BatchNorm) -> None:
    """Running statistics as torch keeps them: of the parameters' dtype, or of that they were converted from."""
    recorded = layer.__dict__.pop(_NARROW, None)
    dtype = recorded if layer.weight is None else layer.weight.dtype
    for name in STATISTICS:
        buffer = layer._buffers.get(name)
        if dtype is not None and buffer is not None and not isinstance(buffer, UninitializedBuffer):
            layer._buffers[name] = buffer.to(dtype)
