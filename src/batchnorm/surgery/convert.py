"""`convert`: turn the batch norms of a model into ours, or into layers that do not use the batch."""

from __future__ import annotations

import functools

from torch import nn

from batchnorm import memory
from batchnorm.errors import ArgumentError
from batchnorm.layers import BatchNorm
from batchnorm.logs import logger
from batchnorm.statistics import Statistics
from batchnorm.surgery.absorb import release_activations
from batchnorm.surgery.alternatives import Alternative, To
from batchnorm.surgery.by_hand import hand_written, why_left_by_hand
from batchnorm.surgery.exchange import convert_layers, target_class
from batchnorm.surgery.fuse import fuse_layers
from batchnorm.surgery.report import Report
from batchnorm.surgery.rewritten import restore_forwards
from batchnorm.surgery.standardized import standardize
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import Slot, layers_of, slots_of

_NAMES = {"group": "group norms", "layer": "layer norms", "instance": "instance norms", "none": "no normalization"}


@transactional()
def convert(
    model: nn.Module,
    *,
    to: To | None = None,
    channels_per_group: int = 8,
    standardize_weights: bool = False,
    statistics: Statistics | None = None,
    fuse: bool = False,
    save_memory: bool = False,
) -> nn.Module:
    """Turn every batch norm of a model into ours, in place, and return the model. Lazy layers stay lazy, frozen ones frozen.

    It converts `nn.BatchNorm1d`, `2d` and `3d`; `nn.SyncBatchNorm`, unless there are several processes (see `synchronize`); frozen
    batch norms of other libraries, if they have four buffers (weight, bias, running_mean, running_var) and compute accordingly; and
    subclasses that normalize as torch does and then call their submodules or an activation (timm's `BatchNormAct2d`), which is
    checked with random numbers. The objects stay instances of their classes.

    Outputs, gradients, state_dict, parameters and hooks do not change; `revert` undoes it. Hand-written layers are not converted (see
    `interop.from_tutorial`). The logger `batchnorm` says how many batch norms changed, which did not, and why; as a warning if some
    did not, or if nothing changed.

    With `to`, batch norms become layers that do not use the batch instead. They keep weight, bias, eps and hooks; `revert` brings the
    running statistics back. Outputs change, so the model must be trained or tuned afterwards. Frozen batch norms do not use the batch
    either, and stay.

    Args:
        model: changed in place; may be a single layer.
        to: "group" is `nn.GroupNorm` (Wu & He 2018, arXiv:1803.08494) with up to 32 groups; "layer" one group of all channels, or
            `nn.LayerNorm` over the channels where they are the last axis; "instance" `nn.InstanceNorm2d` and so on; "none" leaves
            weight and bias alone. None converts to our batch norms.
        channels_per_group: the fewest channels in a group. Batch norms with fewer channels stay, with this reason.
        standardize_weights: also standardize the weights of every convolution (Qiao et al. 2019, arXiv:1903.10520);
            with `to` only.
        statistics: a statistics source for every layer, including those that are ours already; None changes no source. Frozen
            layers stay frozen, and use it after `unfreeze`.
        fuse: call `batchnorm.fuse` afterwards, for speed: batch norms then apply the activations and additions that follow them.
            Without it activations stay separate modules, which other tools may hook.
        save_memory: register hooks that run every call of this model in `batchnorm.save_memory`, with all our batch norms; set a
            layer's attribute `save_memory` to False to exclude it. The hooks run only if this model is called, not a submodule of it.

    Raises:
        ArgumentError: if model is not a module, or options of batch norms are given with `to`, or `standardize_weights` without it.
        InputError: if statistics is not a statistics source, or `to` or `channels_per_group` out of range.
    """
    slots = slots_of(model)
    if to is not None:
        if statistics is not None or fuse or save_memory:
            raise ArgumentError(
                f"to={to!r} leaves no batch norms, but statistics, fuse or save_memory was given, which are options of batch norms; "
                "leave them out"
            )
        _leave_batch_norm(slots, Alternative(to, channels_per_group), standardize_weights)
        return model
    if standardize_weights:
        raise ArgumentError("standardize_weights needs to='group' or another alternative to batch norm, but to is None")
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


def why_not_replaced(model: nn.Module, alternative: Alternative) -> dict[int, str]:
    """The reasons why `convert(to=...)` does not replace batch norms of a model, by the layers' ids."""
    choices = alternative.choices(slots_of(model), _ours)
    return {id(layer): found for layer, _, found in choices if isinstance(found, str)}


_ours = functools.partial(target_class, synchronizing=True)  # statistics of one sample need no replicas


def _leave_batch_norm(slots: list[Slot], alternative: Alternative, standardize_weights: bool) -> None:
    """Replace every batch norm in these slots, and log what was replaced."""
    restore_forwards(slots)
    release_activations(slots)
    report = Report("convert", f"replaced by {_NAMES[alternative.to]}")
    for layer, paths, found in list(alternative.choices(slots, _ours)):
        report.total += 1
        if isinstance(found, str):
            report.leave(paths, found)
            continue
        alternative.replace(layer, found)
        report.changed.append(paths)
        logger.info("convert: %s is now %s", paths, layer)
    for name, layer in hand_written(slots).items():
        report.total += 1
        report.leave(name, why_left_by_hand(layer))
    report.log()
    if standardize_weights:
        logger.info("convert: standardized the weights of %d convolutions", len(standardize(slots)))
