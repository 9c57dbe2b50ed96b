"""Converting a model: its batch norms become ours."""

from __future__ import annotations

from torch import nn

from batchnorm import memory
from batchnorm.layers import BatchNorm
from batchnorm.statistics import Statistics
from batchnorm.surgery.by_hand import warn_of_hand_written
from batchnorm.surgery.exchange import convert_layers
from batchnorm.surgery.fuse import fuse_layers
from batchnorm.surgery.report import Report
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import layers_of, slots_of


@transactional()
def convert(
    model: nn.Module, *, statistics: Statistics | None = None, fuse: bool = False, save_memory: bool = False
) -> nn.Module:
    """Make every batch norm of a model ours, in place, and return the model. Lazy ones stay lazy, frozen ones frozen.

    Taken are `nn.BatchNorm1d`, `2d` and `3d`, `nn.SyncBatchNorm` (but not among several processes: see `synchronize`), frozen
    batch norms of other libraries, which have four buffers (weight, bias, running_mean, running_var) and compute accordingly, and
    subclasses that normalize as torch does and then call their submodules or an activation (timm's `BatchNormAct2d`), which is found
    out with random numbers. Their objects stay instances of their classes.

    Outputs, gradients, state_dict, parameters and hooks stay what they were; `revert` goes back. Layers written by hand are left (see
    `interop.from_tutorial`). The logger `batchnorm` says how many of the batch norms changed, which did not, and why: as a warning if
    there are any, or if nothing changed.

    Args:
        model: changed in place; it may be the layer itself.
        statistics: a statistics source for every layer, those that are ours already too; None leaves them theirs. Frozen
            layers stay frozen, and get it when they are unfrozen.
        fuse: go on with `batchnorm.fuse`, for speed: batch norms apply the activations and additions that follow them. Without it
            activations stay modules of their own, which other tools may hook.
        save_memory: let the model run in `batchnorm.save_memory` whenever it is called, by hooks of its own, and all its batch norms
            of ours take part; those whose attribute `save_memory` is set to False again do not. It is the model given here that
            must be called, not a part of it.

    Raises:
        ArgumentError: if model is not a module.
        InputError: if statistics is not a statistics source.
    """
    slots = slots_of(model)
    warn_of_hand_written("convert", slots)
    report = convert_layers(slots, Report("convert", "changed"), statistics)
    if save_memory:
        for layer, _ in layers_of(slots):
            if isinstance(layer, BatchNorm):
                layer.save_memory = True
        memory.attach(model)
    report.log()
    if fuse:
        fuse_layers(model, report).log()
    return model
