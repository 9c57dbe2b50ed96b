"""Running statistics for averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import StateError
from batchnorm.layers import STATISTICS, BatchNorm
from batchnorm.statistics import buffers_of
from batchnorm.surgery.transaction import transaction
from batchnorm.surgery.walker import slots_of

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # reserved names of torch's wrappers


def copy_statistics(source: nn.Module, target: nn.Module) -> nn.Module:
    """Copy running statistics and counters from the batch norms of `source` to those of `target`, and return `target`.

    For averaged weights (EMA, SWA), whose model never updates running statistics itself. Layers are matched by name, without the
    prefixes of wrappers (`torch.optim.swa_utils.AveragedModel`, DDP, FSDP, `torch.compile`, checkpoint wrappers). They may be torch's or
    ours, with any statistics source. Buffers that the layer in `source` lacks get initial values, as when a plain checkpoint is loaded.
    The copied statistics belong to the weights of `source`; if those of `target` are far from them, use `recalibrate`.

    Raises:
        ArgumentError: if `source` or `target` is not a module.
        StateError: if a layer of `target` with running statistics has no counterpart of its size in `source`; then nothing is copied.
    """
    pairs = pairs_of(source, target)
    with transaction(target, values=True), torch.no_grad():
        for to, of in pairs:
            to.copy_(of)
    return target


def pairs_of(source: nn.Module, target: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each running statistic and counter of `target`, and the tensor of `source` that belongs to it, as in `copy_statistics`.

    Raises:
        ArgumentError, StateError: as `copy_statistics`.
    """
    named = [
        {
            without_wrappers(slot.path): slot.module
            for slot in slots_of(model)
            if isinstance(slot.module, _BatchNorm) and slot.module.running_mean is not None
        }
        for model in (source, target)
    ]
    pairs = list[tuple[Tensor, Tensor]]()
    for path, layer in named[1].items():
        other = named[0].get(path)
        own = buffers_of(layer.statistics) if isinstance(layer, BatchNorm) else {}
        found = {name: getattr(other, name, None) for name in (*STATISTICS, "num_batches_tracked", *own)}
        for (
            name,
            buffer,
        ) in own.items():  # with another statistics source: initial values, as when a checkpoint is loaded
            of, like = found[name], found[buffer.like]
            if like is not None and (of is None or of.shape != getattr(layer, name).shape):
                found[name] = buffer.start(like)
        for name, of in found.items():
            to = getattr(layer, name)
            if of is None or of.shape != to.shape:
                raise StateError(
                    f"every batch norm of the target must have a counterpart of its size in the source, but {path or 'the model'} "
                    "has none; copy between models of the same structure"
                )
            pairs.append((to, of))
    return pairs


def without_wrappers(path: str) -> str:
    names = [name for name in path.split(".") if name not in _WRAPPED]
    while names and names[0] == "module":  # of AveragedModel and DDP, which may be nested
        names.pop(0)
    return ".".join(names)
