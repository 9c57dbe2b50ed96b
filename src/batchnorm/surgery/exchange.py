"""Turn torch's batch norms into ours, and back, without losing anything.

A layer changes its class, as torch's lazy layers do, and stays the same object. So shared modules stay shared, and parameters, buffers,
hooks, the training flag, custom attributes and references to the layer stay valid.

If anything raises, the model is restored (`transaction`).
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from batchnorm import memory
from batchnorm.layers import (
    OPTIONS,
    STATISTICS,
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    check_statistics,
)
from batchnorm.logs import logger
from batchnorm.statistics import Batch, Running, Statistics
from batchnorm.surgery import alternatives, frozen
from batchnorm.surgery.absorb import release_activations
from batchnorm.surgery.by_hand import hand_written, why_left_by_hand
from batchnorm.surgery.classes import become
from batchnorm.surgery.frozen import FrozenBatchNorm
from batchnorm.surgery.report import Report
from batchnorm.surgery.rewritten import restore_forwards
from batchnorm.surgery.standardized import restore_weights
from batchnorm.surgery.subclasses import class_before, derived, mapped, rest_of_layer
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import Slot, layers_of, norms_of, slots_of

_OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_BASES: dict[type[nn.Module], type[BatchNorm]] = {**_OURS, nn.SyncBatchNorm: BatchNorm, _BatchNorm: BatchNorm}
_TORCHS: dict[type[nn.Module], type[nn.Module]] = {ours: torchs for torchs, ours in _OURS.items()}
_TAKEN = (*OPTIONS, "num_nonfinite_batches", "keep_wide_statistics", "gamma", "beta")  # names with a meaning in ours
_DTYPES = "_dtypes_before_conversion"
_STATISTICS = "_statistics_before_conversion"


def convert_layers(
    slots: list[Slot], report: Report, statistics: Statistics | None = None, *, synchronizing: bool = False
) -> Report:
    """Turn the batch norms in these slots into ours, and fill the report; `synchronizing` allows SyncBatchNorm with several processes."""
    if statistics is not None:
        check_statistics(statistics)
    for layer, paths in norms_of(slots):
        report.total += 1
        if isinstance(layer, BatchNorm):
            if statistics is None:
                report.already += 1
            else:
                _set_source(layer, statistics)
                report.changed.append(paths)
            continue
        cls = target_class(layer, synchronizing=synchronizing)
        if isinstance(cls, str):
            report.leave(paths, cls)
            continue
        if not isinstance(layer, _BatchNorm):
            frozen.prepare(layer)
        before = type(layer).__name__
        become_ours(layer, cls)
        assert isinstance(layer, BatchNorm)
        _set_source(layer, statistics)
        report.changed.append(paths)
        name = type(layer).__name__
        logger.info("%s: %s is now %s", report.operation, paths, f"batchnorm.{name}" if name == before else f"{name}")
    for name, layer in hand_written(slots).items():
        report.total += 1
        report.leave(name, why_left_by_hand(layer))
    return report


@transactional()
def revert(model: nn.Module) -> nn.Module:
    """Turn our batch norms back into torch's, in place, and return the model: the inverse of `convert` and `fuse`.

    Layers that came from a subclass, or from a frozen batch norm of another library, become that again; so do layers that
    `convert(to=...)` replaced, with the weights learned since and the running statistics of before. Layers that use what torch's
    do not have (an activation they were built with, another channel axis, the biased running variance ...) do not change, and the
    logger `batchnorm` says so.

    Raises:
        ArgumentError: if model is not a module.
    """
    slots = slots_of(model)
    restore_weights(slots)
    alternatives.restore(slots)
    for slot in slots:
        memory.detach(slot.module)
    restore_forwards(slots)
    release_activations(slots)
    for layer, paths in layers_of(slots):
        if not isinstance(layer, BatchNorm):
            continue
        before = layer.__dict__.get(_STATISTICS)
        frozen_since = isinstance(layer.statistics, Running) and layer.statistics != Running()  # as set by `convert`
        if before is not None and not frozen_since:
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
        cls = _torchs(layer)
        if isinstance(layer, FrozenBatchNorm):
            frozen.clear(layer)
        become(layer, cls)
        logger.info(
            "revert: %s is now %s.%s",
            paths,
            "torch.nn" if isinstance(layer, _BatchNorm) else cls.__module__,
            cls.__name__,
        )
    return model


def _set_source(layer: BatchNorm, statistics: Statistics | None) -> None:
    if statistics is None:
        return
    frozen = layer.statistics if isinstance(layer.statistics, Running) else None
    before = layer.statistics if frozen is None else frozen.before or Batch()
    layer.__dict__.setdefault(_STATISTICS, before)
    layer.statistics = statistics if frozen is None else replace(frozen, before=statistics)


def become_ours(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Turn a batch norm into one of ours; it stays the same object, with all its attributes."""
    become(layer, cls)
    assert isinstance(layer, BatchNorm)
    for name in OPTIONS:  # of the layer itself: compiled code compares an attribute of the class in three steps
        layer.__dict__.setdefault(name, getattr(layer, name))
    layer.__dict__[_DTYPES] = {
        name: value.dtype
        for name in ("weight", *STATISTICS)
        if (value := getattr(layer, name)) is not None and not is_lazy(value)
    }
    layer._prepare_buffers()


def why_left(layer: nn.Module) -> str | None:
    """Why `convert` cannot convert this batch norm, or None."""
    found = target_class(layer)
    return found if isinstance(found, str) else None


def target_class(layer: nn.Module, *, synchronizing: bool = False) -> type[nn.Module] | str:
    """Our class for a batch norm, or the reason why there is none."""
    reason = _conflict(layer)
    if reason:
        return reason
    if not isinstance(layer, _BatchNorm):
        return frozen.target_class(layer)
    if isinstance(layer, nn.SyncBatchNorm) and not synchronizing and _has_replicas(layer):
        return "it is a SyncBatchNorm among several processes; call batchnorm.synchronize, which converts it on all of them"
    if type(layer) in _BASES:
        return _BASES[type(layer)]
    if isinstance(layer, LazyModuleMixin):
        return f"it is a {type(layer).__name__}, which is still lazy; call the model once first"
    rest = rest_of_layer(layer)
    if isinstance(rest, str):
        return rest

    def target(cls: type[nn.Module]) -> type[nn.Module]:
        ours = next(_BASES[base] for base in cls.__mro__ if base in _BASES)
        return _BASES[cls] if cls in _BASES else derived(ours, cls, rest)

    return mapped(type(layer), target)


def _has_replicas(layer: nn.SyncBatchNorm) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(layer.process_group) > 1


def _conflict(layer: nn.Module) -> str | None:
    """Why the layer cannot have our options, or None."""
    if "forward" in layer.__dict__:
        return "it has a forward of its own"
    taken = [name for name in _TAKEN if hasattr(layer, name)]
    return f"it has an attribute {taken[0]!r} of its own, which has another meaning in ours" if taken else None


def _torchs(layer: BatchNorm) -> type[nn.Module]:
    """The class that `revert` gives a layer; its own if there is none."""
    if isinstance(layer, FrozenBatchNorm):
        return frozen.class_before(layer)
    synchronized = "process_group" in layer.__dict__

    def target(cls: type[nn.Module]) -> type[nn.Module]:
        if cls is BatchNorm and synchronized:
            return nn.SyncBatchNorm
        return class_before(cls) or _TORCHS.get(cls, cls)

    return mapped(type(layer), target)


def _not_revertible(layer: BatchNorm) -> str | None:
    if issubclass(_torchs(layer), BatchNorm):
        return f"torch has no {type(layer).__name__}"
    own = ("statistics",) if isinstance(layer, FrozenBatchNorm) else ()
    beyond = [name for name in OPTIONS if name not in own and getattr(layer, name) != getattr(type(layer), name)]
    return f"torch's layer has no {', '.join(beyond)}" if beyond else None


def _restore_statistics_dtypes(layer: BatchNorm) -> None:
    """Restore the dtypes of the running statistics from before the conversion; if the model was cast since, use the parameters'."""
    before = layer.__dict__.pop(_DTYPES, {})
    weight = None if layer.weight is None else layer.weight.dtype
    cast = weight != before.get("weight")
    for name in STATISTICS:
        buffer = layer._buffers.get(name)
        dtype = weight if cast else before.get(name)
        if dtype is not None and buffer is not None and not is_lazy(buffer):
            layer._buffers[name] = buffer.to(dtype)
