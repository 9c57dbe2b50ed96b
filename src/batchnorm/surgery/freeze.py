"""Freezing batch norms, so that it survives `.train()`."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm
from batchnorm.logs import logger
from batchnorm.statistics import Batch, Running
from batchnorm.surgery.convert import convert
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import layers_of, slots_of


@transactional()
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
    for layer, paths in layers_of(slots_of(model)):
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


@transactional()
def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze`, in place, and return the model: the statistics come from where they came before, and what learned learns again.

    Raises:
        ArgumentError: if model is not a module.
    """
    for layer, paths in layers_of(slots_of(model)):
        if isinstance(layer, BatchNorm) and isinstance(layer.statistics, Running):
            for name in layer.statistics.learned:
                value = getattr(layer, name)
                if value is not None:
                    value.requires_grad_(True)
            layer.statistics = layer.statistics.before or Batch()
            logger.info("unfreeze: %s learns again", paths)
    return model


def _not_freezable(layer: _BatchNorm) -> str | None:
    if not isinstance(layer, BatchNorm):
        return f"it is a {type(layer).__name__}, which is not ours"
    return None if layer.track_running_stats else "it has no running statistics"
