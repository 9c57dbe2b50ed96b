"""Traces forwards that depend on shapes: the value of every node is computed for the example during tracing.

The traced code then sees shapes, dtypes and devices as plain values; only code that depends on the numbers in tensors cannot be traced.
The graph is valid for these shapes only, so it is analyzed but never run.
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
    """A proxy that knows its value."""

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
    """A tracer that computes the value of every node.

    Args:
        values: the values of the arguments, in the order of the signature.
    """

    def __init__(self, path: str, leaves: set[int], is_leaf: IsLeaf, values: tuple[Any, ...]) -> None:
        super().__init__(path, leaves, is_leaf)
        self._values, self._computing = iter(values), False

    def proxy(self, node: fx.Node) -> ConcreteProxy:
        """A proxy for a node."""
        return ConcreteProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Create a node, and compute its value."""
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if kind != "output":
            given, named = tree_map_only(ConcreteProxy, lambda proxy: proxy.value, (args, kwargs))
            proxy.value = self._value(kind, target, given, named)
        return proxy

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace a call of a module; while a value is computed, only run it."""
        return forward(*args, **kwargs) if self._computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A node for a parameter; while a value is computed, the parameter itself."""
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
