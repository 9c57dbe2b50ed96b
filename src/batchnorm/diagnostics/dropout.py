"""Finds dropout in a forward, and turns it off, whether it is a module or a call of torch.nn.functional."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
}  # fmt: skip


class Dropout(TorchFunctionMode):
    """A context that notes whether dropout changed anything; with `off` it changes nothing.

    Attributes:
        active: whether a call drew a mask, or would have.
    """

    def __init__(self, *, off: bool = False) -> None:
        super().__init__()
        self._off, self.active = off, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
            self.active |= training and p > 0
            if self._off:
                return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)
