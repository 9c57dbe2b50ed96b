"""A forward made of a graph, on one module alone: the module stays the same object, of the same class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer


class Rewritten:
    """What stands in a module's `forward` instead of its class's. Deleting the attribute goes back.

    It calls what hangs in the module by name, so it may be copied and pickled with it, and modules in it may be exchanged.

    Attributes:
        source: the Python code, for reading.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        code = graph.python_code("self")
        self.source = f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"
        self._module = module
        self._forward = _compile(self.source)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self._module, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forward = _compile(self.source)


def _compile(source: str) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(compile(source, "<batchnorm>", "exec"), names)
    return names["forward"]
