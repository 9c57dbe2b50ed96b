"""Freezing batch norms, so that it survives `.train()`."""

from __future__ import annotations

from typing import Any, Self

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm
from batchnorm.logs import logger
from batchnorm.statistics import Batch, Running
from batchnorm.surgery.classes import become, like, remade
from batchnorm.surgery.exchange import convert_layers
from batchnorm.surgery.report import Report
from batchnorm.surgery.subclasses import class_before, mapped
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import layers_of, slots_of

_HELD = "_before_freezing"


class HeldInInference(nn.Module):
    """Of a frozen layer whose class is not ours: it stays in inference, where it leaves its statistics alone, whatever `train` says."""

    def train(self, mode: bool = True) -> Self:
        """Change the mode of its submodules alone."""
        super().train(mode)
        self.__dict__[_HELD] = (mode, self.__dict__[_HELD][1])
        self.training = False
        return self


@transactional()
def freeze(model: nn.Module, *, affine: bool = True) -> nn.Module:
    """Make every batch norm of a model normalize by its running statistics, in training too, in place, and return the model.

    Unlike `.eval()` it survives the next `.train()`, and unlike `requires_grad=False` it stops the buffers: none of them changes, the
    counters neither. Momentum and everything else is kept; `unfreeze` goes back. Torch's layers become ours first, as with `convert`.
    Subclasses that cannot be converted are held in inference, whatever `.train()` says. Layers without running statistics are left.
    The logger `batchnorm` says how many were frozen and what was left: as a warning if there is any, or if nothing changed.

    Args:
        model: changed in place; it may be the layer itself.
        affine: stop weight and bias too, by `requires_grad = False`; of pruned and parametrized layers what they are computed from.

    Raises:
        ArgumentError: if model is not a module.
    """
    slots = slots_of(model)
    converted, report = convert_layers(slots, Report("freeze", "converted")), Report("freeze", "frozen")
    report.total = converted.total
    for layer, paths in layers_of(slots):
        if layer.running_mean is None or not layer.track_running_stats:
            report.leave(paths, "it has no running statistics")
            continue
        learned = _stopped(layer) if affine else ()
        if isinstance(layer, BatchNorm):
            before = layer.statistics
            if isinstance(before, Running):  # frozen already: what it goes back to stays
                before, learned = before.before, before.learned + learned
            layer.statistics = Running(before, learned)
        else:
            reason = converted.left[paths]
            logger.info("freeze: %s is held in inference: %s", paths, reason)
            _hold(layer, learned)
        report.changed.append(paths)
        logger.info("freeze: froze %s", paths)
    report.log()
    return model


@transactional()
def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze`, in place, and return the model: the statistics come from where they came before, and what learned learns again.

    Raises:
        ArgumentError: if model is not a module.
    """
    for layer, paths in layers_of(slots_of(model)):
        if isinstance(layer, HeldInInference):
            layer.training, learned = layer.__dict__.pop(_HELD)
            become(layer, mapped(type(layer), lambda cls: class_before(cls) or cls))
        elif isinstance(layer, BatchNorm) and isinstance(layer.statistics, Running):
            learned = layer.statistics.learned
            layer.statistics = layer.statistics.before or Batch()
        else:
            continue
        for name, value in layer.named_parameters():
            if name in learned:
                value.requires_grad = True
        logger.info("unfreeze: %s learns again", paths)
    return model


def _stopped(layer: _BatchNorm) -> tuple[str, ...]:
    """Stop weight and bias, or what they are computed from; return the names of those that learned."""
    owned = [(name, value) for name, value in layer.named_parameters() if _is_affine(name)]
    learned = [(name, value) for name, value in owned if value.requires_grad]
    for _, value in learned:
        value.requires_grad = False  # not requires_grad_(), which lazy parameters refuse
    return tuple(name for name, _ in learned)


def _is_affine(name: str) -> bool:
    """Whether a parameter is the layer's, and not that of a submodule it calls."""
    return "." not in name or name.startswith("parametrizations.")


def _hold(layer: _BatchNorm, learned: tuple[str, ...]) -> None:
    if isinstance(layer, HeldInInference):
        training, before = layer.__dict__[_HELD]
        layer.__dict__[_HELD] = (training, before + learned)
        return
    layer.__dict__[_HELD] = (layer.training, learned)
    become(layer, mapped(type(layer), _held))
    layer.training = False


@remade
def _held(base: type[nn.Module]) -> type[nn.Module]:
    cls: Any = type(base.__name__, (HeldInInference, base), {**like(base), "class_before": base})
    return cls
