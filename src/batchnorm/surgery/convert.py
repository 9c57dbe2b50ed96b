"""`convert`: turn the batch norms of a model into ours."""

from __future__ import annotations

from torch import nn

from batchnorm import memory
from batchnorm.layers import BatchNorm
from batchnorm.statistics import Statistics
from batchnorm.surgery.exchange import convert_layers
from batchnorm.surgery.fuse import fuse_layers
from batchnorm.surgery.report import Report
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import layers_of, slots_of


@transactional()
def convert(
    model: nn.Module, *, statistics: Statistics | None = None, fuse: bool = False, save_memory: bool = False
) -> nn.Module:
    """Turn every batch norm of a model into ours, in place, and return the model. Lazy layers stay lazy, frozen ones frozen.

    It converts `nn.BatchNorm1d`, `2d` and `3d`; `nn.SyncBatchNorm`, unless there are several processes (see `synchronize`); frozen
    batch norms of other libraries, if they have four buffers (weight, bias, running_mean, running_var) and compute accordingly; and
    subclasses that normalize as torch does and then call their submodules or an activation (timm's `BatchNormAct2d`), which is
    checked with random numbers. The objects stay instances of their classes.

    Outputs, gradients, state_dict, parameters and hooks do not change; `revert` undoes it. Hand-written layers are not converted (see
    `interop.from_tutorial`). The logger `batchnorm` says how many batch norms changed, which did not, and why; as a warning if some
    did not, or if nothing changed.

    Args:
        model: changed in place; may be a single layer.
        statistics: a statistics source for every layer, including those that are ours already; None changes no source. Frozen
            layers stay frozen, and use it after `unfreeze`.
        fuse: call `batchnorm.fuse` afterwards, for speed: batch norms then apply the activations and additions that follow them.
            Without it activations stay separate modules, which other tools may hook.
        save_memory: register hooks that run every call of this model in `batchnorm.save_memory`, with all our batch norms; set a
            layer's attribute `save_memory` to False to exclude it. The hooks run only if this model is called, not a submodule of it.

    Raises:
        ArgumentError: if model is not a module.
        InputError: if statistics is not a statistics source.
    """
    slots = slots_of(model)
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
