"""Detects what a traced graph cannot represent, so that such modules keep their own forward."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from batchnorm.errors import StateError
from batchnorm.torch_state import saved_tensors_hooks

_CONTAINERS = (list, tuple, set, collections.deque)


def modes() -> tuple[Any, ...]:
    """Global state, such as grad mode and autocast, that affects operators but that a graph does not record."""
    nesting = torch.autocast_increment_nesting()  # counts every open context, even one that changes nothing
    torch.autocast_decrement_nesting()
    hooks = saved_tensors_hooks(while_tracing=True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), nesting, hooks


_refusing = threading.RLock()


@contextlib.contextmanager
def without_functions() -> Iterator[None]:
    """Raise on calls of an `autograd.Function` in this thread, because a graph would record its forward and lose its backward.

    Replacing `apply` is not enough: it is written in C since torch 2.14, and models hold references to it. But each call first creates a
    context object, whose class derives from `BackwardCFunction`.
    """
    made: Any = BackwardCFunction
    thread = threading.get_ident()
    with _refusing:
        before = vars(made).get("__init__")

        def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == thread:
                raise StateError("it calls an autograd.Function")
            (super(made, self).__init__ if before is None else before.__get__(self))(*args, **kwargs)

        made.__init__ = refuse
        try:
            yield
        finally:
            if before is None:
                del made.__init__
            else:
                made.__init__ = before


class Attributes:
    """A snapshot of the attributes of a module and its submodules."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, _attributes(module)

    def changed(self) -> bool:
        """Whether an attribute was replaced or written into since the snapshot."""
        now = _attributes(self._module)
        return len(now) != len(self._before) or any(
            key != other or value is not was for (key, value), (other, was) in zip(now, self._before, strict=True)
        )


def _attributes(module: nn.Module) -> list[tuple[Any, Any]]:
    """Pairs of a key and an object; holding the object prevents another one from getting its id."""
    found = list[tuple[Any, Any]]()
    for path, each in module.named_modules():
        for name, value in vars(each).items():
            if name.startswith("_tensor_constant"):  # set by the tracer
                continue
            inner: list[Any] = list(value.values()) if isinstance(value, dict) else []
            inner = list(value) if isinstance(value, _CONTAINERS) else inner
            for number, item in enumerate((value, *inner)):
                version = item._version if isinstance(item, Tensor) and not item.is_inference() else None
                found.append(((path, name, number, version), item))
    return found
