"""Runs hooks on the calls of layers, then restores the model's modes, attributes and hooks, also after an exception."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn


class Observer(NamedTuple):
    """The hooks of one layer. A layer that a model contains under several names is one layer, and is observed once.

    Attributes:
        layer: the layer.
        before: called as `before(layer, args, kwargs)` before each call.
        after: called as `after(layer, args, kwargs, output)` after each call, or None.
    """

    layer: nn.Module
    before: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
    after: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None] | None = None


@contextlib.contextmanager
def observed(model: nn.Module, observers: Sequence[Observer], training: bool, **attributes: Any) -> Iterator[None]:
    """Run the hooks of `observers` in this context, with all modules in one mode and `attributes` set on the observed layers.

    At the end, also after an exception, everything is restored. The mode is set without `train()` and `eval()`, which some modules override
    to do more.
    """
    modes = [(module, module.training) for module in model.modules()]
    previous = [(each.layer, {name: getattr(each.layer, name) for name in attributes}) for each in observers]
    with contextlib.ExitStack() as stack:
        try:
            for module, _ in modes:
                module.training = training
            for layer, before, after in observers:
                for name, value in attributes.items():
                    setattr(layer, name, value)
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                if after is not None:
                    stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
            yield
        finally:
            for layer, values in previous:
                for name, value in values.items():
                    setattr(layer, name, value)
            for module, mode in modes:
                module.training = mode
