"""Finds calls of torch.nn.functional.batch_norm that are no layer: they normalize by the batch wherever their author says so."""

from __future__ import annotations

import contextlib
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CALLS = {F.batch_norm: (5, "training"), torch.batch_norm: (5, "training")}  # the place of the argument, and its name


class FunctionalNorms(TorchFunctionMode):
    """A context that notes the modules in whose forward batch norm ran by the statistics of the batch.

    Attributes:
        names: of these modules, in the order of the first calls; "" is the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = list[str]()
        self._model, self._inside, self._hooks = model, list[str](), contextlib.ExitStack()

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            entering = module.register_forward_pre_hook(lambda _module, _args, name=name: self._inside.append(name))
            leaving = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
            self._hooks.callback(entering.remove)
            self._hooks.callback(leaving.remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CALLS:
            place, name = _CALLS[func]
            by_batch = kwargs.get(name, args[place] if len(args) > place else False)
            if by_batch and self._inside and self._inside[-1] not in self.names:
                self.names.append(self._inside[-1])
        return func(*args, **kwargs)

    def _leave(self) -> None:
        if self._inside:
            self._inside.pop()
