"""Running statistics for averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import StateError
from batchnorm.layers import STATISTICS, BatchNorm
from batchnorm.statistics import kept_by
from batchnorm.surgery.transaction import transaction
from batchnorm.surgery.walker import slots_of

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # reserved names of torch's wrappers


def copy_statistics(source: nn.Module, target: nn.Module) -> nn.Module:
    """Give the batch norms of `target` the running statistics and the counter of those of `source`, and return `target`.

    For averaged weights (EMA, SWA): the average learns no statistics of its own. Layers meet by name; what wrappers add to it does not
    count (`torch.optim.swa_utils.AveragedModel`, DDP, FSDP, `torch.compile`, checkpoint wrappers). They may be torch's or ours, of any
    part; what the source's part does not keep begins anew, as where a plain checkpoint is loaded. Copied statistics are those of the
    weights that made them; weights far from these want statistics of their own.

    Raises:
        ArgumentError: if one is not a module.
        StateError: if a layer of `target` with running statistics has no counterpart of its size in `source`; nothing is copied then.
    """
    named = [
        {
            _without_wrappers(slot.path): slot.module
            for slot in slots_of(model)
            if isinstance(slot.module, _BatchNorm) and slot.module.running_mean is not None
        }
        for model in (source, target)
    ]
    pairs = list[tuple[Tensor, Tensor]]()
    for path, layer in named[1].items():
        other = named[0].get(path)
        kept = kept_by(layer.statistics) if isinstance(layer, BatchNorm) else {}
        found = {name: getattr(other, name, None) for name in (*STATISTICS, "num_batches_tracked", *kept)}
        for name, buffer in kept.items():  # of another part they begin as where a checkpoint is loaded
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
    with transaction(target, values=True), torch.no_grad():
        for to, of in pairs:
            to.copy_(of)
    return target


def _without_wrappers(path: str) -> str:
    names = [name for name in path.split(".") if name not in _WRAPPED]
    while names and names[0] == "module":  # of AveragedModel and DDP, perhaps one in the other
        names.pop(0)
    return ".".join(names)
