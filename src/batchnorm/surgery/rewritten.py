"""Gives a module a forward that is generated from a graph; the module stays the same object.

`Rewritten` can be undone. It passes the fused activation with each call and does not store it in the layers, so the class's own forward
still returns the same output. The class's forward runs if the module has changed since it was traced, and when torch.fx traces the module
again. `rewrite` cannot be undone; it is for changes after which the class's own forward would return a different output.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from batchnorm.kernels import Activation
from batchnorm.kernels.activation import WITHOUT_SLOPE
from batchnorm.layers import BatchNorm
from batchnorm.surgery.classes import become, like, remade
from batchnorm.surgery.walker import Slot


class Rewritten:
    """A fused forward, set as a module's attribute `forward`. Deleting the attribute restores the forward of the class.

    It calls submodules by name, so it can be copied and pickled with its module, and submodules can be replaced.

    Attributes:
        source: the Python code, for reading.
        applies: a description of the operations that each fused batch norm applies, by its name.
    """

    def __init__(
        self, module: nn.Module, graph: fx.Graph, passed: tuple[str, ...] = (), applies: dict[str, str] | None = None
    ) -> None:
        self.source = source_of(graph)
        self.applies = applies or {}
        self._module = module
        self._forward = compiled(self.source)
        self._norms = tuple(_place(module, name) for name in self.applies)
        self._passed = tuple((*_place(module, name), module.get_submodule(name)) for name in passed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        if not self._is_current():
            return type(module).forward(module, *args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, fx.Proxy):
                return type(module).forward(module, *args, **kwargs)
        return self._forward(module, *args, **kwargs)

    def _is_current(self) -> bool:
        """Whether the bypassed modules are those that were traced, and have neither hooks nor a forward of their own."""
        for parent, name, module in self._passed:
            if parent._modules.get(name) is not module or not _is_plain(module):
                return False
        for parent, name in self._norms:
            layer = parent._modules.get(name)
            if layer is None or not _is_plain(layer) or getattr(layer, "activation", None) is not None:
                return False
        return True

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature without `self`; torch.export reads it, and `__code__`."""
        signature = inspect.signature(self._forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> types.CodeType:
        return self._forward.__code__

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forward = compiled(self.source)


def normalize_and_apply(
    layer: nn.Module, input: Tensor, residual: Any = None, activation: str | None = None, slope: float = 0.01
) -> Any:
    """The output of `activation(layer(input) + residual)`, in one pass where the layer, shapes and dtypes allow it.

    Generated forwards call this function by its name.
    """
    act = None if activation is None else WITHOUT_SLOPE.get(activation) or Activation(activation, slope)
    if isinstance(layer, BatchNorm):  # otherwise, the layer was replaced after tracing
        if residual is None:
            return layer(input, activation=act)
        if isinstance(residual, Tensor) and residual.dtype == input.dtype:
            if residual.shape == input.shape:
                return layer(input, residual=residual, activation=act)
            dense = not (residual.is_nested or input.is_nested)
            if dense and torch.broadcast_shapes(residual.shape, input.shape) == input.shape:
                return layer(input, residual=residual.expand_as(input), activation=act)
    z = layer(input)
    if residual is not None:
        z = z + residual
    return z if act is None else act(z)


def rewrite(module: nn.Module, graph: fx.Graph) -> None:
    """Give a module its own class, derived from its class, whose forward is the graph. This cannot be undone."""
    become(module, _rewritten_class(type(module), source_of(graph)))


@remade
def _rewritten_class(base: type[nn.Module], source: str) -> type[nn.Module]:
    forward: Any = compiled(source)
    forward.source = source  # for reading
    return type(base.__name__, (base,), {**like(base), "forward": forward})


def restore_forwards(slots: list[Slot]) -> None:
    """Restore the forwards of the modules' classes."""
    for slot in slots:
        if isinstance(slot.module.__dict__.get("forward"), Rewritten):
            del slot.module.forward


def source_of(graph: fx.Graph) -> str:
    """The Python code of a graph as a function `forward`, with its imports."""
    _resolve_annotations(graph)
    code = graph.python_code("self")
    return f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"


def compiled(source: str) -> types.FunctionType:
    """Compile a source, and return the function `forward` that it defines."""
    names: dict[str, Any] = {}
    exec(compile(source, "<batchnorm>", "exec"), names)
    return names["forward"]


def _resolve_annotations(graph: fx.Graph) -> None:
    """Remove annotations that cannot be imported by name, such as strings (`from __future__ import annotations`)."""
    for node in graph.nodes:
        node.type = node.type if node.type is Tensor else None


def _is_plain(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor a forward of its own; like `is_watched`, but fast enough for each call."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The parent of the module with this name, and its name there."""
    parent, _, last = name.rpartition(".")
    return module.get_submodule(parent), last
