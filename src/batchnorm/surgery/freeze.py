"""`freeze` and `unfreeze`: batch norms that stay frozen after `.train()`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm
from batchnorm.logs import logger
from batchnorm.statistics import Batch, Running
from batchnorm.surgery.by_hand import hand_written
from batchnorm.surgery.classes import become, like, remade
from batchnorm.surgery.exchange import convert_layers
from batchnorm.surgery.held import BEFORE_FREEZING, HeldInInference
from batchnorm.surgery.report import Report
from batchnorm.surgery.subclasses import class_before, mapped
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import layers_of, slots_of


@transactional()
def freeze(model: nn.Module, *, affine: bool = True, save_memory: bool = False) -> nn.Module:
    """Make every batch norm of a model normalize by its running statistics, in training too, in place, and return the model.

    Unlike `.eval()`, it survives the next `.train()`. Unlike `requires_grad=False`, it freezes the buffers too, counters included.
    Everything else stays, momentum for example; `unfreeze` undoes it. Torch's layers become ours first, as with `convert`. Subclasses
    that cannot be converted stay in inference mode, also after `.train()`. Layers without running statistics do not change. The logger
    `batchnorm` says how many layers were frozen and which were not; as a warning if there are any, or if nothing changed.

    A frozen layer whose weight is frozen too saves no input for the backward, unless an activation that it applies needs it. With
    `affine=False` and `save_memory`, layers save none either where their input is the output of a convolution or a linear layer: both
    become one node of autograd's graph ("Tune mode", You et al. 2023, arXiv:2305.11624). Outputs stay the same to the last bit, gradients
    to rounding, and the modules as they are. At its first call, a layer that saves its input all the same says why in a warning.

    Args:
        model: changed in place; may be a single layer.
        affine: freeze weight and bias too, by `requires_grad = False`; in pruned and parametrized layers, the parameters that they are
            computed from.
        save_memory: with affine=False, save no input of the batch norms for the gradient of weight. The outputs of the layers
            before them are then no longer part of the graph: `torch.autograd.grad` with respect to one, after the call, raises.

    Raises:
        ArgumentError: if model is not a module.
    """
    slots = slots_of(model)
    converted, report = convert_layers(slots, Report("freeze", "converted")), Report("freeze", "frozen")
    report.total = converted.total
    report.left = {name: converted.left[name] for name in hand_written(slots)}
    for layer, paths in layers_of(slots):
        if layer.running_mean is None or not layer.track_running_stats:
            report.leave(paths, "it has no running statistics")
            continue
        learned = _stopped(layer) if affine else ()
        if isinstance(layer, BatchNorm):
            before = layer.statistics
            if isinstance(before, Running):  # already frozen: `unfreeze` still restores the first source
                before, learned = before.before, before.learned + learned
            layer.statistics = Running(before, learned, save_memory=save_memory, name=paths)
        else:
            reason = converted.left[paths]
            logger.info("freeze: %s stays in inference mode: %s", paths, reason)
            if save_memory:
                logger.warning("freeze: %s saves its input for the backward: %s", paths, reason)
            _hold(layer, learned)
        report.changed.append(paths)
        logger.info("freeze: froze %s", paths)
    report.log()
    return model


@transactional()
def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze`, in place, and return the model: restore the statistics sources, and make frozen parameters trainable again.

    Raises:
        ArgumentError: if model is not a module.
    """
    for layer, paths in layers_of(slots_of(model)):
        if isinstance(layer, HeldInInference):
            layer.training, learned = layer.__dict__.pop(BEFORE_FREEZING)
            become(layer, mapped(type(layer), lambda cls: class_before(cls) or cls))
        elif isinstance(layer, BatchNorm) and isinstance(layer.statistics, Running):
            learned = layer.statistics.learned
            layer.statistics = layer.statistics.before or Batch()
        else:
            continue
        for name, value in layer.named_parameters():
            if name in learned:
                value.requires_grad = True
        logger.info("unfreeze: unfroze %s", paths)
    return model


def _stopped(layer: _BatchNorm) -> tuple[str, ...]:
    """Freeze weight and bias, or the parameters that they are computed from; return the names of those that were trainable."""
    owned = [(name, value) for name, value in layer.named_parameters() if _is_affine(name)]
    learned = [(name, value) for name, value in owned if value.requires_grad]
    for _, value in learned:
        value.requires_grad = False  # not requires_grad_(), which lazy parameters refuse
    return tuple(name for name, _ in learned)


def _is_affine(name: str) -> bool:
    """Whether a parameter belongs to the layer itself, not to a submodule that it calls."""
    return "." not in name or name.startswith("parametrizations.")


def _hold(layer: _BatchNorm, learned: tuple[str, ...]) -> None:
    if isinstance(layer, HeldInInference):
        training, before = layer.__dict__[BEFORE_FREEZING]
        layer.__dict__[BEFORE_FREEZING] = (training, before + learned)
        return
    layer.__dict__[BEFORE_FREEZING] = (layer.training, learned)
    become(layer, mapped(type(layer), _held))
    layer.training = False


@remade
def _held(base: type[nn.Module]) -> type[nn.Module]:
    cls: Any = type(base.__name__, (HeldInInference, base), {**like(base), "class_before": base})
    return cls
