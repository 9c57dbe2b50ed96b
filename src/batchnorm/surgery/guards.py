"""What a traced graph does not hold, so that a module that does it must keep its own forward."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import function
from torch.utils._pytree import tree_leaves

from batchnorm.errors import StateError

_CONTAINERS = (list, tuple, set, collections.deque)


def modes() -> tuple[Any, ...]:
    """What context managers set that operators heed, and that a graph does not hold."""
    nesting = torch.autocast_increment_nesting()  # also of those that change nothing today
    torch.autocast_decrement_nesting()
    private: Any = torch._C
    hooks = private._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), nesting, hooks


@contextlib.contextmanager
def without_functions() -> Iterator[None]:
    """Within it, an `autograd.Function` refuses stand-ins for tensors: what it does backward would be lost.

    All its calls go through the helper that is exchanged here, those by a reference to `apply`, too.
    """
    private: Any = function
    helpers = private._functorch.utils
    before = helpers.unwrap_dead_wrappers

    def refuse(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if any(isinstance(value, fx.Proxy) for value in tree_leaves(args)):
            raise StateError("it calls an autograd.Function")
        return before(args)

    helpers.unwrap_dead_wrappers = refuse
    try:
        yield
    finally:
        helpers.unwrap_dead_wrappers = before


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
