"""Classes created at run time from the class of a module; their instances can be copied and pickled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Make = Callable[..., type[nn.Module]]


def remade(make: Make) -> Make:
    """Decorate a function that creates a class: results are cached, and copying or unpickling an instance calls the function again.

    The function must be importable, and its arguments hashable and picklable.
    """

    @functools.cache
    @functools.wraps(make)
    def making(*args: Any) -> type[nn.Module]:
        cls = make(*args)

        def reduced(self: Any, protocol: Any) -> Any:  # noqa: ARG001 (pickle's signature)
            return _instance, (making, args), self.__getstate__()

        setattr(cls, "__reduce_ex__", reduced)  # noqa: B010 (types do not take it as an attribute)
        return cls

    return making


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of a module in place."""
    module.__class__ = cls


def like(base: type[nn.Module]) -> dict[str, Any]:
    """The names and the docstring of `base`, for a class that is created from it."""
    return {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}


def _instance(make: Make, args: tuple[Any, ...]) -> nn.Module:
    return object.__new__(make(*args))
