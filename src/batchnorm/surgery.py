"""Exchanging torch's batch norms for ours in a model, and back, with nothing lost.

A layer is not replaced but changes its class, as torch's lazy layers do: the object stays the same one, so shared modules stay
shared, and parameters, buffers, hooks, the training flag, custom attributes and every reference to the layer are kept because
nothing touches them.

What is planned is planned for the whole model first, and carried out only when the plan stands.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from batchnorm import memory
from batchnorm.errors import ArgumentError, StateError
from batchnorm.kernels import from_module
from batchnorm.layers import OPTIONS, STATISTICS, BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, check_statistics
from batchnorm.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.logs import logger
from batchnorm.statistics import Batch, Running, Statistics, kept_by

_OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}
_TAKEN = (*OPTIONS, "num_nonfinite_batches", "keep_wide_statistics", "gamma", "beta")  # names with a meaning in ours
_DTYPES = "_dtypes_before_conversion"
_STATISTICS = "_statistics_before_conversion"


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


class Absorbed(nn.Module):
    """Stands where an activation stood that the batch norm before it now applies; returns its input.

    It keeps the place, so that the names of a Sequential's children and the keys of its state_dict stay, and the original, for
    `revert`. Should the batch norm be exchanged (by torch's `convert_sync_batchnorm`, say), the activation would be lost: then it
    raises a StateError.
    """

    def __init__(self, original: nn.Module, layer: Slot) -> None:
        super().__init__()
        # In tuples, so that they are no children: those would be visited by hooks, apply and repr.
        self._original, self._layer = (original,), layer

    @property
    def original(self) -> nn.Module:
        """The activation that stood here."""
        return self._original[0]

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, which the layer before has activated already.

        Raises:
            StateError: if that layer is no longer there.
        """
        _, parent, name, layer = self._layer
        there = None if parent is None else parent._modules.get(name)
        if there is not layer and (there is None or all(module is not layer for module in there.modules())):
            raise StateError(
                f"the batch norm that applies {self.original} must stand before it, but there is a {type(there).__name__} "
                "now; call batchnorm.revert before layers are exchanged, or convert with fuse=False"
            )
        return input

    def extra_repr(self) -> str:
        return repr(self.original)


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


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Each batch norm of a model, torch's and ours, once, by the first of its names; "the model" if it is that itself.

    Raises:
        ArgumentError: if model is not a module.
    """
    found: dict[int, tuple[str, _BatchNorm]] = {}
    for slot in _slots(model):
        if isinstance(slot.module, _BatchNorm):
            found.setdefault(id(slot.module), (slot.path or "the model", slot.module))
    return dict(found.values())


def convert(
    model: nn.Module, *, statistics: Statistics | None = None, fuse: bool = True, save_memory: bool = False
) -> nn.Module:
    """Make every `nn.BatchNorm1d`, `2d` and `3d` of a model ours, in place, and return the model. Lazy ones stay lazy.

    Outputs, gradients, state_dict, parameters and hooks stay what they were; `revert` goes back. Layers of a subclass are left
    alone, since their forward may do anything. What was changed, what was left and why goes to the logger `batchnorm`.

    Args:
        model: changed in place; it may be the layer itself.
        statistics: a part of `batchnorm.statistics` for every layer, those that are ours already too; None leaves them theirs. Frozen
            layers stay frozen, and get it when they are unfrozen.
        fuse: let a batch norm apply the activation that directly follows it in an `nn.Sequential`, in the same pass. They stay
            apart where either has hooks or a forward of its own, or the batch norm hangs in several places. Code that reads the
            output of the batch norm itself, by indexing, slicing or iterating over the Sequential or by a reference of its own,
            would find it activated: use False there.
        save_memory: let the model run in `batchnorm.save_memory` whenever it is called, by hooks of its own, and all its batch norms
            of ours take part; those whose attribute `save_memory` is set to False again do not. It is the model given here that
            must be called, not a part of it.

    Raises:
        ArgumentError: if model is not a module.
        InputError: if statistics is not a part.
    """
    slots = _slots(model)
    if statistics is not None:
        check_statistics(statistics)
    for layer, paths in _layers(slots):
        if isinstance(layer, BatchNorm):
            _give(layer, statistics)
            continue
        reason = not_convertible(layer)
        if reason:
            logger.info("convert: left %s: %s", paths, reason)
            continue
        become_ours(layer, _OURS[type(layer)])
        assert isinstance(layer, BatchNorm)
        _give(layer, statistics)
        logger.info("convert: %s is now batchnorm.%s", paths, type(layer).__name__)
    if fuse:
        _absorb_activations(slots)
    if save_memory:
        for layer, _ in _layers(slots):
            if isinstance(layer, BatchNorm):
                layer.save_memory = True
        memory.attach(model)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Make every layer of ours torch's again, in place, and return the model: the inverse of `convert`, object by object.

    A layer that does what torch's cannot (an activation it was built with, another channel axis, the biased running variance ...)
    is left, and the logger `batchnorm` says so.

    Raises:
        ArgumentError: if model is not a module.
    """
    slots = _slots(model)
    for slot in slots:
        memory.detach(slot.module)
    for layer, activation in _sequential_pairs(slots):
        if isinstance(layer.module, BatchNorm) and isinstance(activation.module, Absorbed):
            original = activation.module.original.train(activation.module.training)
            activation.hang(original)
            layer.module.activation = None
    for layer, paths in _layers(slots):
        if not isinstance(layer, BatchNorm):
            continue
        before = layer.__dict__.get(_STATISTICS)
        if before is not None and not isinstance(layer.statistics, Running):
            layer.statistics = before
            del layer.__dict__[_STATISTICS]
        layer.__dict__.pop("save_memory", None)
        reason = _not_revertible(layer)
        if reason:
            logger.warning("revert: left %s: %s", paths, reason)
            continue
        _restore_statistics_dtypes(layer)
        del layer.num_nonfinite_batches
        for name in (*OPTIONS, "keep_wide_statistics"):
            layer.__dict__.pop(name, None)
        _become(layer, _torchs(layer))
        logger.info("revert: %s is now torch.nn.%s", paths, type(layer).__name__)
    return model


def freeze(model: nn.Module, *, affine: bool = True) -> nn.Module:
    """Make every batch norm of a model normalize by its running statistics, in training too, in place, and return the model.

    Unlike `.eval()` it survives the next `.train()`, and unlike `requires_grad=False` it stops the buffers: none of them moves, the
    counters neither. Momentum and everything else is kept; `unfreeze` goes back. Torch's layers become ours first (`convert` with
    fuse=False). Layers without running statistics, and those that cannot be converted, are left, and the logger `batchnorm` says so.

    Args:
        model: changed in place; it may be the layer itself.
        affine: stop weight and bias too, by `requires_grad_(False)`.

    Raises:
        ArgumentError: if model is not a module.
    """
    convert(model, fuse=False)
    for layer, paths in _layers(_slots(model)):
        reason = _not_freezable(layer)
        if reason:
            logger.warning("freeze: left %s: %s", paths, reason)
            continue
        assert isinstance(layer, BatchNorm)
        before, learned = layer.statistics, ()
        if isinstance(before, Running):  # frozen already: what it goes back to stays
            before, learned = before.before, before.learned
        if affine:
            stopped = [(name, value) for name in ("weight", "bias") if (value := getattr(layer, name)) is not None]
            learned += tuple(name for name, value in stopped if value.requires_grad)
            for _, value in stopped:
                value.requires_grad_(False)
        layer.statistics = Running(before, learned)
        logger.info("freeze: froze %s", paths)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze`, in place, and return the model: the statistics come from where they came before, and what learned learns again.

    Raises:
        ArgumentError: if model is not a module.
    """
    for layer, paths in _layers(_slots(model)):
        if isinstance(layer, BatchNorm) and isinstance(layer.statistics, Running):
            for name in layer.statistics.learned:
                value = getattr(layer, name)
                if value is not None:
                    value.requires_grad_(True)
            layer.statistics = layer.statistics.before or Batch()
            logger.info("unfreeze: %s learns again", paths)
    return model


def copy_statistics(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give the batch norms of `target` the running statistics and the counter of those of `source`, and return `target`.

    For averaged weights (EMA, SWA): the average learns no statistics of its own. Layers meet by name; a prefix `module.` (of
    `torch.optim.swa_utils.AveragedModel`, of DDP) does not count. They may be torch's or ours, of any part. Copied statistics are
    those of the weights that made them; weights far from these want statistics of their own.

    Raises:
        ArgumentError: if one is not a module.
        StateError: if a layer of `target` with running statistics has no counterpart of its size in `source`; nothing is copied then.
    """
    named = [
        {
            slot.path.removeprefix("module."): slot.module
            for slot in _slots(model)
            if isinstance(slot.module, _BatchNorm) and slot.module.running_mean is not None
        }
        for model in (source, target)
    ]
    pairs = list[tuple[Tensor, Tensor]]()
    for path, layer in named[1].items():
        other = named[0].get(path)
        kept = kept_by(layer.statistics) if isinstance(layer, BatchNorm) else {}
        for name in (*STATISTICS, "num_batches_tracked", *(name for name in kept if hasattr(other, name))):
            to, of = getattr(layer, name), getattr(other, name, None)
            if of is None or of.shape != to.shape:
                raise StateError(
                    f"every batch norm of the target must have a counterpart of its size in the source, but {path or 'the model'} "
                    "has none; copy between models of the same structure"
                )
            pairs.append((to, of))
    with torch.no_grad():
        for to, of in pairs:
            to.copy_(of)
    return target


def _give(layer: BatchNorm, statistics: Statistics | None) -> None:
    if statistics is None:
        return
    frozen = layer.statistics if isinstance(layer.statistics, Running) else None
    before = layer.statistics if frozen is None else frozen.before or Batch()
    layer.__dict__.setdefault(_STATISTICS, before)
    layer.statistics = statistics if frozen is None else Running(statistics, frozen.learned)


def become_ours(layer: _BatchNorm, cls: type[BatchNorm]) -> None:
    """Make a layer of torch's one of ours; it stays the same object, and keeps all it has."""
    _become(layer, cls)
    assert isinstance(layer, BatchNorm)
    layer.__dict__[_DTYPES] = {
        name: value.dtype
        for name in ("weight", *STATISTICS)
        if (value := getattr(layer, name)) is not None and not is_lazy(value)
    }
    layer._prepare_buffers()


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
    return (
        isinstance(parent, nn.Sequential)
        and type(parent).forward is nn.Sequential.forward
        and "forward" not in parent.__dict__
    )


def _absorb_activations(slots: list[Slot]) -> None:
    places = collections.Counter(id(slot.module) for slot in slots)
    for before, after in _sequential_pairs(slots):
        layer, activation = before.module, from_module(after.module)
        if not isinstance(layer, BatchNorm) or activation is None or layer.activation is not None:
            continue
        if places[id(layer)] > 1 or _is_watched(layer) or _is_watched(after.module):
            reason = (
                "the layer hangs in several places" if places[id(layer)] > 1 else "one has hooks or its own forward"
            )
            logger.info("convert: left %s and %s apart: %s", before.path, after.path, reason)
            continue
        layer.activation = activation
        absorbed = Absorbed(after.module, before).train(after.module.training)
        after.hang(absorbed)
        logger.info("convert: %s now applies %s", before.path, activation)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward of this very object, stand between it and its neighbor."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    lazy = isinstance(module, LazyModuleMixin)  # whose own pre-hook goes away with its first input
    return "forward" in module.__dict__ or (any(hooks) and not (lazy and sum(map(len, hooks)) == 1))


def not_convertible(layer: _BatchNorm, classes: Mapping[type[nn.Module], type[BatchNorm]] = _OURS) -> str | None:
    """Why a layer cannot become what `classes` says of its class, or None."""
    if type(layer) not in classes:
        return f"it is a {type(layer).__name__}, whose forward may differ"
    if "forward" in layer.__dict__:
        return "it has a forward of its own"
    taken = [name for name in _TAKEN if hasattr(layer, name)]
    return f"it has an attribute {taken[0]!r} of its own, which means something else in ours" if taken else None


def _torchs(layer: BatchNorm) -> type[nn.Module]:
    """The class of torch's that a layer of ours can go back to; its own where there is none."""
    if type(layer) is BatchNorm and "process_group" in layer.__dict__:
        return nn.SyncBatchNorm  # `synchronize` took it over
    return _TORCHS.get(type(layer), type(layer))


def _not_revertible(layer: BatchNorm) -> str | None:
    if _torchs(layer) is type(layer):
        return f"torch has no {type(layer).__name__}"
    beyond = [name for name in OPTIONS if getattr(layer, name) != getattr(BatchNorm, name)]
    return f"torch's layer has no {', '.join(beyond)}" if beyond else None


def _not_freezable(layer: _BatchNorm) -> str | None:
    if not isinstance(layer, BatchNorm):
        return f"it is a {type(layer).__name__}, which is not ours"
    return None if layer.track_running_stats else "it has no running statistics"


def _restore_statistics_dtypes(layer: BatchNorm) -> None:
    """Running statistics as torch has them: those they came with, unless the model was cast since; then the parameters'."""
    before = layer.__dict__.pop(_DTYPES, {})
    weight = None if layer.weight is None else layer.weight.dtype
    cast = weight != before.get("weight")
    for name in STATISTICS:
        buffer = layer._buffers.get(name)
        dtype = weight if cast else before.get(name)
        if dtype is not None and buffer is not None and not is_lazy(buffer):
            layer._buffers[name] = buffer.to(dtype)
