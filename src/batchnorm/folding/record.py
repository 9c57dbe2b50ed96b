"""Runs the model on the example, and records which modules are called, how often, with which arguments and outputs."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from batchnorm.errors import ArgumentError, StateError
from batchnorm.folding.concrete import ConcreteTracer
from batchnorm.folding.flow import Shapes
from batchnorm.functional.compiled import eager
from batchnorm.surgery.tracing import IsLeaf, Tracer


class Call(NamedTuple):
    """The first call of a module, with copies of its tensors, since later code may write into them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Record:
    """The calls of a model's modules when it runs on the example.

    Attributes:
        output: the output of the model.
        counts: how often each module is called, by its id.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        self.counts: Counter[int] = Counter()
        self._calls: dict[int, Call] = {}
        self._complete = False
        handles = [
            module.register_forward_pre_hook(lambda module, _: self.counts.update([id(module)]))
            for module in model.modules()
        ]
        self.output = self._run(handles)
        self._calls[id(model)] = Call(args, kwargs, self.output)

    def concrete(self, path: str, signature: inspect.Signature) -> dict[str, Any] | None:
        """The arguments of a module that contain no tensor, as constants for the tracer; None if the module is not called."""
        if not self.counts[id(self._model.get_submodule(path))]:
            return None
        return {name: value for name, value in self._bound(path, signature).items() if not _has_tensor(value)}

    def tracer(self, path: str, leaves: set[int], is_leaf: IsLeaf) -> Tracer:
        """Create a tracer that also runs the module on the example."""
        signature = inspect.signature(type(self._model.get_submodule(path)).forward)
        return ConcreteTracer(path, leaves, is_leaf, _copied(tuple(self._bound(path, signature).values())))

    def accept(self, path: str, graph: fx.Graph) -> None:
        """Record the shapes in a module's graph, and check that the graph's output is the module's.

        Raises:
            StateError: if the outputs differ.
        """
        module = self._model.get_submodule(path)
        bound = self._bound(path, inspect.signature(type(module).forward))
        with torch.no_grad():
            found = Shapes(module, graph=graph).run(*_copied(tuple(bound.values())))
        wanted = self._call(module).output
        if not difference(found, wanted) <= 1e-3 * max(1.0, largest(wanted)):
            raise StateError("the output of its graph differs")

    def takes_tensors_only(self, path: str) -> bool:
        """Whether all arguments of a module are tensors, so that its graph is valid for any values."""
        signature = inspect.signature(type(self._model.get_submodule(path)).forward)
        return not self.concrete(path, signature) and len(self._bound(path, signature)) == len(signature.parameters) - 1

    def _bound(self, path: str, signature: inspect.Signature) -> dict[str, Any]:
        call = self._call(self._model.get_submodule(path))
        bound = signature.bind(None, *call.args, **call.kwargs)
        bound.apply_defaults()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [name for name, parameter in signature.parameters.items() if parameter.kind not in variadic]
        return {name: bound.arguments[name] for name in named[1:]}

    def _call(self, module: nn.Module) -> Call:
        if id(module) not in self._calls and not self._complete:  # only needed if the model itself could not be traced
            self._complete = True

            def note(module: nn.Module, _: Any, output: Any) -> None:
                before = entered.pop()
                if id(module) not in self._calls:
                    self._calls[id(module)] = Call(*before, _copied(output))

            def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
                entered.append((_copied(args), _copied(kwargs)))

            entered: list[tuple[Any, Any]] = []
            handles = []
            for module_ in self._model.modules():
                if module_ is not self._model and next(module_.children(), None) is not None:
                    handles.append(module_.register_forward_pre_hook(enter, with_kwargs=True))
                    handles.append(module_.register_forward_hook(note))
            self._run(handles)
        return self._calls[id(module)]

    def _run(self, handles: list[Any]) -> Any:
        try:
            with eager():  # compiled code ignores hooks that were registered later
                return call(self._model, self._args, self._kwargs)
        finally:
            for handle in handles:
                handle.remove()


def example(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a user's example into arguments of a call: a tensor, a tuple of arguments, or a mapping of named ones.

    Raises:
        ArgumentError: on anything else.
    """
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    if isinstance(given, Mapping):
        return (), dict(given)
    raise ArgumentError(
        "example_input must be a tensor, a tuple of the model's arguments, or a dict of its named arguments, but got "
        f"{type(given).__name__}"
    )


def call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's output for copies of the example's tensors."""
    with torch.no_grad():
        return model(*_copied(args), **_copied(kwargs))


def tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of an output."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors(vars(leaf))


def difference(found: Any, wanted: Any) -> float:
    """The largest absolute difference between the tensors of two outputs; NaN if shapes differ, or an element is NaN in only one."""
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    differences = [_difference(a, b) for a, b in pairs if a.shape != b.shape or b.numel()]
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0)


def largest(output: Any) -> float:
    """The largest finite absolute value in the tensors of an output."""
    values = (value.detach().double().abs() for value in tensors(output) if value.numel() and not value.is_complex())
    return max((value[value.isfinite()].max().item() for value in values if value.isfinite().any()), default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("nan")
    wide = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    differences = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return differences.max().item()


def _copied(values: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, values)


def _has_tensor(value: Any) -> bool:
    return next(tensors(value), None) is not None
