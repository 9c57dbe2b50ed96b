"""What a model without batch norm modules has in their place: functional calls, formulas, other normalizations."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.formats import named
from batchnorm.diagnostics.inline import FunctionalNorms
from batchnorm.diagnostics.record import in_training

_OTHERS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def seen_in_place(case: Case) -> str:
    """A sentence without its period: that no batch norm module was found, and what was seen."""
    others = Counter(type(module).__name__ for module in case.model.modules() if isinstance(module, _OTHERS))
    texts = ["no batch norm module was found"]
    if others:
        texts.append(", ".join(f"{count} {name}" for name, count in others.items()))
    return "; ".join([*texts, *_seen_in_training(case)])


def _seen_in_training(case: Case) -> list[str]:
    if case.arguments.loader is None:
        return ["pass loader= to look for calls of F.batch_norm and formulas in a forward"]
    if not case.runs:
        return []
    try:
        with case.untouched(), torch.no_grad(), in_training(case.inside):
            item = next(iter(case.arguments.loader), None)
            if item is None:
                return ["the loader yields nothing"]
            with FunctionalNorms(case.inside) as found:
                case.call(item)
    except Exception as error:  # a model that nothing is wrong with is not to fail here
        return [f"a forward in training mode raised {type(error).__name__}"]
    texts = list[str]()
    if found.called:
        texts.append(f"F.batch_norm is called in the forward of {named(found.called)}")
    written = [name for name in found.written if name not in found.called]
    if written:
        texts.append(f"mean and variance over the batch are computed in the forward of {named(written)}")
    if not texts:
        return ["no call of F.batch_norm and no variance over the batch was seen in a forward in training mode"]
    return [*texts, "only modules are diagnosed, such as bn.BatchNorm2d"]
