"""Exchanging torch's batch norms for ours in a model, and back, with nothing lost.

A layer is not replaced but changes its class, as torch's lazy layers do: the object stays the same one, so shared modules stay
shared, and parameters, buffers, hooks, the training flag, custom attributes and every reference to the layer are kept because
nothing touches them.

If anything raises, the model is as it was (`transaction`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm import memory
from batchnorm.layers import OPTIONS, STATISTICS, BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, check_statistics
from batchnorm.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.logs import logger
from batchnorm.statistics import Batch, Running, Statistics
from batchnorm.surgery import frozen
from batchnorm.surgery.absorb import absorb_activations, release_activations
from batchnorm.surgery.frozen import FrozenBatchNorm
from batchnorm.surgery.rewritten import restore_forwards
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import layers_of, norms_of, slots_of

_OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_CONVERTED: dict[type[nn.Module], type[BatchNorm]] = {**_OURS, nn.SyncBatchNorm: BatchNorm}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}
_TAKEN = (*OPTIONS, "num_nonfinite_batches", "keep_wide_statistics", "gamma", "beta")  # names with a meaning in ours
_DTYPES = "_dtypes_before_conversion"
_STATISTICS = "_statistics_before_conversion"


@transactional()
def convert(
    model: nn.Module, *, statistics: Statistics | None = None, fuse: bool = True, save_memory: bool = False
) -> nn.Module:
    """Make every batch norm of a model ours, in place, and return the model. Lazy ones stay lazy, frozen ones frozen.

    Taken are `nn.BatchNorm1d`, `2d` and `3d`, `nn.SyncBatchNorm` (but not among several processes: see `synchronize`), and frozen
    batch norms of other libraries, which have four buffers (weight, bias, running_mean, running_var) and compute accordingly.

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
    slots = slots_of(model)
    if statistics is not None:
        check_statistics(statistics)
    for layer, paths in norms_of(slots):
        if isinstance(layer, BatchNorm):
            _give(layer, statistics)
            continue
        reason = why_left(layer)
        if reason:
            logger.info("convert: left %s: %s", paths, reason)
            continue
        if isinstance(layer, _BatchNorm):
            become_ours(layer, _CONVERTED[type(layer)])
        else:
            frozen.prepare(layer)
            become_ours(layer, FrozenBatchNorm)
        assert isinstance(layer, BatchNorm)
        _give(layer, statistics)
        logger.info("convert: %s is now batchnorm.%s", paths, type(layer).__name__)
    if fuse:
        absorb_activations(slots)
    if save_memory:
        for layer, _ in layers_of(slots):
            if isinstance(layer, BatchNorm):
                layer.save_memory = True
        memory.attach(model)
    return model


@transactional()
def revert(model: nn.Module) -> nn.Module:
    """Make every layer of ours torch's again, in place, and return the model: the inverse of `convert` and `fuse`, object by object.

    What was a frozen batch norm of another library becomes that.

    A layer that does what torch's cannot (an activation it was built with, another channel axis, the biased running variance ...)
    is left, and the logger `batchnorm` says so.

    Raises:
        ArgumentError: if model is not a module.
    """
    slots = slots_of(model)
    for slot in slots:
        memory.detach(slot.module)
    restore_forwards(slots)
    release_activations(slots)
    for layer, paths in layers_of(slots):
        if not isinstance(layer, BatchNorm):
            continue
        before = layer.__dict__.get(_STATISTICS)
        frozen_since = isinstance(layer.statistics, Running) and layer.statistics != Running()  # which `convert` gives
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
        _become(layer, cls)
        logger.info(
            "revert: %s is now %s.%s",
            paths,
            "torch.nn" if isinstance(layer, _BatchNorm) else cls.__module__,
            cls.__name__,
        )
    return model


def _give(layer: BatchNorm, statistics: Statistics | None) -> None:
    if statistics is None:
        return
    frozen = layer.statistics if isinstance(layer.statistics, Running) else None
    before = layer.statistics if frozen is None else frozen.before or Batch()
    layer.__dict__.setdefault(_STATISTICS, before)
    layer.statistics = statistics if frozen is None else Running(statistics, frozen.learned)


def become_ours(layer: nn.Module, cls: type[BatchNorm]) -> None:
    """Make a batch norm one of ours; it stays the same object, and keeps all it has."""
    _become(layer, cls)
    assert isinstance(layer, BatchNorm)
    layer.__dict__[_DTYPES] = {
        name: value.dtype
        for name in ("weight", *STATISTICS)
        if (value := getattr(layer, name)) is not None and not is_lazy(value)
    }
    layer._prepare_buffers()


def why_left(layer: nn.Module) -> str | None:
    """Why `convert` leaves a batch norm that is not ours alone, or None."""
    if not isinstance(layer, _BatchNorm):
        return _not_free(layer) or frozen.not_frozen(layer)
    if type(layer) is nn.SyncBatchNorm and _has_replicas(layer):
        return "it is a SyncBatchNorm among several processes; batchnorm.synchronize takes it over on all of them"
    return not_convertible(layer, _CONVERTED)


def _has_replicas(layer: nn.SyncBatchNorm) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(layer.process_group) > 1


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls


def not_convertible(layer: _BatchNorm, classes: Mapping[type[nn.Module], type[BatchNorm]] = _OURS) -> str | None:
    """Why a layer cannot become what `classes` says of its class, or None."""
    if type(layer) not in classes:
        return f"it is a {type(layer).__name__}, whose forward may differ"
    return _not_free(layer)


def _not_free(layer: nn.Module) -> str | None:
    """What stands in the way of options of ours, or None."""
    if "forward" in layer.__dict__:
        return "it has a forward of its own"
    taken = [name for name in _TAKEN if hasattr(layer, name)]
    return f"it has an attribute {taken[0]!r} of its own, which means something else in ours" if taken else None


def _torchs(layer: BatchNorm) -> type[nn.Module]:
    """The class of torch's that a layer of ours can go back to; its own where there is none."""
    if type(layer) is BatchNorm and "process_group" in layer.__dict__:
        return nn.SyncBatchNorm
    if type(layer) is FrozenBatchNorm:
        return frozen.class_before(layer)
    return _TORCHS.get(type(layer), type(layer))


def _not_revertible(layer: BatchNorm) -> str | None:
    if _torchs(layer) is type(layer):
        return f"torch has no {type(layer).__name__}"
    own = ("statistics",) if type(layer) is FrozenBatchNorm else ()
    beyond = [name for name in OPTIONS if name not in own and getattr(layer, name) != getattr(BatchNorm, name)]
    return f"torch's layer has no {', '.join(beyond)}" if beyond else None


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
