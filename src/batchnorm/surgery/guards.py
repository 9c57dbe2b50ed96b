"""What a traced graph does not hold, so that a module that does it must keep its own forward."""

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
    """What context managers set that operators heed, and that a graph does not hold."""
    nesting = torch.autocast_increment_nesting()  # also of those that change nothing today
    torch.autocast_decrement_nesting()
    hooks = saved_tensors_hooks(while_tracing=True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), nesting, hooks


_refusing = threading.RLock()


@contextlib.contextmanager
def without_functions() -> Iterator[None]:
    """Within it, an `autograd.Function` raises in this thread: a graph would hold what it does forward, and lose its backward.

    `apply` is written in C since torch 2.14, and models hold references to it. Every call of it makes a context object first, of a class
    that derives from this one.
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
    """The attributes of a module and of all below it, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, _attributes(module)

    def changed(self) -> bool:
        """Whether one is another object since, or was written into."""
        now = _attributes(self._module)
        return len(now) != len(self._before) or any(
            key != other or value is not was for (key, value), (other, was) in zip(now, self._before, strict=True)
        )


def _attributes(module: nn.Module) -> list[tuple[Any, Any]]:
    """Objects with what tells them apart; the objects are kept, so that none takes the place of another."""
    found = list[tuple[Any, Any]]()
    for path, each in module.named_modules():
        for name, value in vars(each).items():
            if name.startswith("_tensor_constant"):  # hung there by the tracer
                continue
            inner: list[Any] = list(value.values()) if isinstance(value, dict) else []
            inner = list(value) if isinstance(value, _CONTAINERS) else inner
            for number, part in enumerate((value, *inner)):
                version = part._version if isinstance(part, Tensor) and not part.is_inference() else None
                found.append(((path, name, number, version), part))
    return found
