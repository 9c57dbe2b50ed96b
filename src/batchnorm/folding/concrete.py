"""Tracing where the way depends on shapes: every value of the graph is computed beside it, for the example.

Shapes, dtypes and devices are then plain numbers to the code that is traced; only what depends on the values themselves cannot be.
The graph holds for such shapes alone, so it serves to see what goes where, not to be run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from batchnorm.surgery.tracing import IsLeaf, Tracer

_KNOWN = ("shape", "ndim", "dtype", "device", "layout", "is_sparse", "is_cuda")
_COMPUTED = (
    "size",
    "dim",
    "numel",
    "nelement",
    "stride",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "__len__",
)


class ConcreteProxy(fx.Proxy):
    """A stand-in that knows the value it stands for."""

    value: Any

    def __getattr__(self, k: str) -> Any:
        value = self.__dict__.get("value")
        if isinstance(value, Tensor) and (k in _KNOWN or k in _COMPUTED):
            return getattr(value, k)
        return super().__getattr__(k)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        proxy: Any = self
        return iter([proxy[at] for at in range(len(self))])


class ConcreteTracer(Tracer):
    """Computes the value of every node.

    Args:
        values: those of the arguments, in the order of the signature.
    """

    def __init__(self, path: str, leaves: set[int], is_leaf: IsLeaf, values: tuple[Any, ...]) -> None:
        super().__init__(path, leaves, is_leaf)
        self._values, self._computing = iter(values), False

    def proxy(self, node: fx.Node) -> ConcreteProxy:
        """A stand-in for a node."""
        return ConcreteProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """A node, and the value it stands for."""
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind != "output":
            given, named = tree_map_only(ConcreteProxy, lambda proxy: proxy.value, (args, kwargs))
            proxy.value = self._value(kind, target, given, named)
        return proxy

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A call in the traced code; one in a value's computation is none of it."""
        return forward(*args, **kwargs) if self._computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter of the traced code is a node; one in a value's computation is itself."""
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return () if target.startswith("*") else next(self._values)
        assert isinstance(self.root, nn.Module)
        self._computing = True
        try:
            with torch.no_grad():
                if kind == "call_module":
                    return self.root.get_submodule(target)(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                if kind == "get_attr":
                    module, _, name = target.rpartition(".")
                    return getattr(self.root.get_submodule(module), name)
                return target(*args, **kwargs)
        finally:
            self._computing = False
