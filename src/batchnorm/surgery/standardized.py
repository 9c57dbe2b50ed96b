"""Weight standardization (Qiao et al. 2019, arXiv:1903.10520): each output channel's weights get mean 0 and variance 1.

A convolution changes its class. It stores the learned weight, as before, and standardizes it in each forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.logs import logger
from batchnorm.surgery.classes import become, like, remade
from batchnorm.surgery.walker import Slot

EPS = 1e-10  # as in the code of Kolesnikov et al. 2019 (arXiv:1912.11370); variances of weights are near 1e-3
_FORWARDS = tuple(cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def standardized(weight: Tensor) -> Tensor:
    """(O, I, *K) -> (O, I, *K): the mean over I and K is 0 and the variance 1 for each output channel (equation 6)."""
    variance, mean = torch.var_mean(weight, dim=tuple(range(1, weight.dim())), correction=0, keepdim=True)
    return (weight - mean) * torch.rsqrt(variance + EPS)


def standardize(slots: list[Slot]) -> list[str]:
    """Let every convolution of a model standardize its weight; return their names.

    Convolutions with one weight for each output channel do not change, because nothing of it would be left; neither do subclasses
    with a forward of their own.
    """
    changed = list[str]()
    for slot in slots:
        layer, name = slot.module, slot.path or "the model"
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or _class_before(layer):
            continue
        if type(layer).forward not in _FORWARDS or "forward" in layer.__dict__:
            logger.info("convert: did not standardize %s: it has a forward of its own", name)
        elif layer.weight[0].numel() == 1:
            logger.info("convert: did not standardize %s: it has one weight for each output channel", name)
        else:
            become(layer, _standardizing(type(layer)))
            changed.append(name)
    return changed


def restore_weights(slots: list[Slot]) -> None:
    """Undo `standardize`: convolutions use the learned weights as they are."""
    for slot in slots:
        before = _class_before(slot.module)
        if before is not None:
            become(slot.module, before)


def _class_before(layer: nn.Module) -> type[nn.Module] | None:
    """The class of a convolution before it standardized; None for every other layer."""
    return vars(type(layer)).get("before_standardizing")


@remade
def _standardizing(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardized(self.weight), self.bias)

    cls: Any = type(base.__name__, (base,), {**like(base), "forward": forward, "before_standardizing": base})
    return cls
