"""A forward made of a graph, on one module alone: the module stays the same object, of the same class."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from batchnorm.errors import StateError
from batchnorm.layers import BatchNorm
from batchnorm.surgery.walker import Slot


class Rewritten:
    """What stands in a module's `forward` instead of its class's. Deleting the attribute goes back.

    It calls what hangs in the module by name, so it may be copied and pickled with it, and modules in it may be exchanged. Should a
    batch norm be exchanged that was given an activation, that would be lost: then a call raises a StateError.

    Attributes:
        source: the Python code, for reading.
        activated: the names of the batch norms in it that were given an activation for this.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, activated: tuple[str, ...] = ()) -> None:
        self.activated = activated
        code = graph.python_code("self")
        self.source = f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"
        self._module = module
        self._forward = _compile(self.source)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for name in self.activated:
            layer = self._module.get_submodule(name)
            if not isinstance(layer, BatchNorm) or layer.activation is None:
                raise StateError(
                    f"{name} must be the batch norm that applies an activation here, but is a {type(layer).__name__} without; call "
                    "batchnorm.revert before layers are exchanged"
                )
        return self._forward(self._module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """Without `self`; torch.export asks for it, and for the code."""
        signature = inspect.signature(self._forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __code__(self) -> types.CodeType:
        return self._forward.__code__

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forward = _compile(self.source)


def normalize_and_add(layer: nn.Module, input: Tensor, residual: Any) -> Any:
    """What `layer(input) + residual` and the layer's activation put out, in one pass where shapes and dtypes allow it.

    Rewritten forwards call it; their source names it. Where the sum is of another shape or dtype than the input, the layer has no
    activation for the time of the call.
    """
    if not isinstance(layer, BatchNorm):  # exchanged since; `Rewritten` saw that no activation is lost
        return layer(input) + residual
    if isinstance(residual, Tensor) and residual.dtype == input.dtype:
        if residual.shape == input.shape:
            return layer(input, residual=residual)
        dense = not (residual.is_nested or input.is_nested)
        if dense and torch.broadcast_shapes(residual.shape, input.shape) == input.shape:
            return layer(input, residual=residual.expand_as(input))
    activation, layer.activation = layer.activation, None
    try:
        z = layer(input) + residual
    finally:
        layer.activation = activation
    return z if activation is None else activation(z)


def restore_forwards(slots: list[Slot]) -> None:
    """Give modules the forward of their class back, and take the activations from the batch norms in them."""
    for slot in slots:
        rewritten = slot.module.__dict__.get("forward")
        if isinstance(rewritten, Rewritten):
            for name in rewritten.activated:
                layer = slot.module.get_submodule(name)
                if isinstance(layer, BatchNorm):
                    layer.activation = None
            del slot.module.forward


def _compile(source: str) -> types.FunctionType:
    names: dict[str, Any] = {}
    exec(compile(source, "<batchnorm>", "exec"), names)
    return names["forward"]
