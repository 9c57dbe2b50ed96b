"""Classes made on the way: the class of one module with something exchanged. Their modules can be copied and pickled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Make = Callable[..., type[nn.Module]]


def remade(make: Make) -> Make:
    """A decorator of functions that make a class: the same arguments give the same class, and a copy of a module calls them again.

    The function must be one that can be imported, and its arguments must be hashable and such that pickle takes them.
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
    """Change the class of a module, which stays the same object."""
    module.__class__ = cls


def like(base: type[nn.Module]) -> dict[str, Any]:
    """What a class made of another has of its names."""
    return {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}


def _instance(make: Make, args: tuple[Any, ...]) -> nn.Module:
    return object.__new__(make(*args))
