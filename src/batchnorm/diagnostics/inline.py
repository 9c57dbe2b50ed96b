"""Finds batch norms that are no modules: calls of torch.nn.functional.batch_norm, and formulas written inline in a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_CALLS = {F.batch_norm: (5, "training"), torch.batch_norm: (5, "training")}  # the place of the argument, and its name
_MEANS, _SPREADS = {"mean", "sum"}, {"var", "std", "var_mean", "std_mean"}


class FunctionalNorms(TorchFunctionMode):
    """A context that notes the modules in whose own forward batch norm runs.

    Attributes:
        names: of modules whose calls of batch_norm use the statistics of the batch, in the order of the first calls; "" is the model.
        called: of modules that call batch_norm at all.
        written: of modules that compute means and variances over the batch, as a batch norm written inline does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names, self.called, self.written = list[str](), list[str](), list[str]()
        self._means = dict[str, int]()  # over the batch, by module
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
        output = func(*args, **kwargs)
        if self._inside:
            name = self._inside[-1]
            if func in _CALLS:
                place, argument = _CALLS[func]
                by_batch = kwargs.get(argument, args[place] if len(args) > place else False)
                _note(self.called, name)
                _note(self.names, name, wanted=by_batch)
            elif _is_over_batch(func, args, kwargs, output):
                self._count(name, getattr(func, "__name__", ""))
        return output

    def _count(self, name: str, function: str) -> None:
        """A mean alone says little; with a variance, or with the mean of squares, it is that of a batch norm."""
        if function in _SPREADS:
            _note(self.written, name)
        else:
            self._means[name] = self._means.get(name, 0) + 1
            _note(self.written, name, wanted=self._means[name] > 1)

    def _leave(self) -> None:
        if self._inside:
            self._means.pop(self._inside.pop(), None)


def _note(names: list[str], name: str, *, wanted: bool = True) -> None:
    if wanted and name not in names:
        names.append(name)


def _is_over_batch(func: Any, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether a call reduces (N, C, ...) over the batch and leaves an axis, such as that of the channels."""
    if getattr(func, "__name__", "") not in _MEANS | _SPREADS:
        return False
    x = args[0] if args else kwargs.get("input")
    axes = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point() or axes is None:
        return False
    given = axes if isinstance(axes, Iterable) else (axes,)
    over = {axis % x.dim() for axis in given if isinstance(axis, int) and not isinstance(axis, bool)}
    left = output[0] if isinstance(output, tuple) else output
    return 0 in over and isinstance(left, Tensor) and left.numel() > 1
