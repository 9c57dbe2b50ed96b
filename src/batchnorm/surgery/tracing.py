"""Traces a whole model with torch.fx, or those of its modules that can be traced."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.errors import StateError
from batchnorm.surgery.absorb import Absorbed
from batchnorm.surgery.graphs import CONSTANT
from batchnorm.surgery.guards import Attributes, modes, without_functions
from batchnorm.surgery.walker import is_watched

Concrete = Callable[[str, inspect.Signature], Mapping[str, Any] | None]
IsLeaf = Callable[[nn.Module, str], bool]
Accept = Callable[[str, fx.Graph], None]
MakeTracer = Callable[[str, set[int], IsLeaf], "Tracer"]


class TracedModule(NamedTuple):
    """A module of the model and its graph.

    Attributes:
        path: its name in the model, "" for the root.
        graph: the graph of its forward; targets of `call_module` are names of its submodules.
    """

    path: str
    graph: fx.Graph

    def full(self, target: Any) -> str:
        """The name in the model of a target of this graph."""
        return f"{self.path}.{target}" if self.path else str(target)


@dataclass
class Traced:
    """The modules of a model that could be traced, and by name the reasons why others could not."""

    modules: list[TracedModule] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class Tracer(fx.Tracer):
    """Does not trace into torch's modules, batch norms, modules with hooks, `leaves`, and modules for which `is_leaf` is true."""

    def __init__(self, path: str, leaves: set[int], is_leaf: IsLeaf) -> None:
        super().__init__()
        self._path, self._leaves, self._is_leaf = path, leaves, is_leaf
        self._modes: tuple[Any, ...] | None = None

    def require_current_modes(self) -> None:
        """From now on, raise if code runs in other modes than the current ones (gradients, autocast, hooks of saved tensors)."""
        self._modes = modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node.

        Raises:
            StateError: if a context manager is active that the graph would not contain.
        """
        if self._modes is not None and modes() != self._modes:
            raise StateError("its forward switches gradients, autocast or checkpoints on or off")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of m becomes one node."""
        name = f"{self._path}.{module_qualified_name}".lstrip(".")
        if id(m) in self._leaves or isinstance(m, (_BatchNorm, Absorbed)) or is_watched(m) or self._is_leaf(m, name):
            return True
        return super().is_leaf_module(m, module_qualified_name)


class Rules(NamedTuple):
    """How to trace.

    Attributes:
        concrete: takes a module's name and the signature of its forward; returns the constant arguments, or None to skip the module.
        is_leaf: whether a call of this module becomes one node; calls of torch's modules always do.
        accept: takes a module's name and its graph; raises if their outputs differ.
        tracers: the tracers to try, in this order.
        whole: whether the graph will replace the forward; then tracing fails if the forward does something that a graph cannot represent.
    """

    concrete: Concrete
    is_leaf: IsLeaf
    accept: Accept
    tracers: tuple[MakeTracer, ...] = (Tracer,)
    whole: bool = False


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters; tracing runs its forward, which may change attributes and buffers."""
    written = itertools.chain(model.buffers(), computed_weights(model))
    copies = {id(tensor): tensor if is_lazy(tensor) else tensor.detach().clone() for tensor in written}
    return copy.deepcopy(model, {**copies, **{id(tensor): tensor for tensor in model.parameters()}})


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model, computed weights included.

    Raises:
        StateError: if it cannot be copied.
    """
    try:
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed_weights(model)})
    except Exception as error:  # copying may raise anything, for example on a lock
        raise StateError(
            f"a model must be one that copy.deepcopy can copy, but {type(error).__name__}: {first_line(error)}; keep locks, files and "
            "outputs out of its attributes, or give its class a __deepcopy__"
        ) from error


def computed_weights(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that are plain attributes, as set by pruning and `weight_norm`; deepcopy refuses them."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def trace_modules(model: nn.Module, rules: Rules) -> Traced:
    """Trace the model. If that fails, make modules that cannot be traced leaves; if it still fails, trace only the submodules.

    The model itself is neither run nor changed.
    """
    return _trace(without_weights(model), "", rules)[0]


def trace_module(model: nn.Module, path: str, rules: Rules) -> tuple[TracedModule | None, str]:
    """Trace one module of the model; if that fails, return None and the reason."""
    try:
        module = without_weights(model).get_submodule(path)
    except Exception as error:  # copying may raise anything, for example on a lock
        return None, f"it cannot be copied: {first_line(error)}"
    attributes = Attributes(module)
    with without_functions() if rules.whole else contextlib.nullcontext():
        traced = _trace(module, path, rules)[0]
    if rules.whole and attributes.changed():
        return None, "its forward writes attributes"
    found = next((each for each in traced.modules if each.path == path), None)
    return found, traced.failures.get(path or "the model", "")


def _trace(module: nn.Module, path: str, rules: Rules) -> tuple[Traced, bool]:
    found = Traced()
    leaves: set[int] = set()
    graph, reason = _attempt(module, path, leaves, rules)
    below: dict[str, tuple[Traced, bool]] = {}
    for name, child in _composite(module, path, rules.is_leaf):
        watched = is_watched(child)  # its call is one node, and it is traced on its own
        if graph is None or watched:
            below[name] = _trace(child, name, rules)
            if watched or not below[name][1]:
                leaves.add(id(child))
    if graph is None and leaves:
        graph, _ = _attempt(module, path, leaves, rules)
    if graph is not None:
        found.modules.append(TracedModule(path, graph))
    else:
        found.failures[path or "the model"] = reason
    for name, (traced, whole) in below.items():
        if graph is None or not whole or is_watched(module.get_submodule(name[len(path) :].lstrip("."))):
            found.modules += traced.modules
            found.failures |= traced.failures
    return found, graph is not None


def _attempt(module: nn.Module, path: str, leaves: set[int], rules: Rules) -> tuple[fx.Graph | None, str]:
    """The graph of a module, or None and the reason."""
    if "forward" in module.__dict__:
        return None, "it has a forward of its own"
    reasons = list[str]()
    for make in rules.tracers:
        states = random.getstate(), torch.get_rng_state()
        try:
            constants = rules.concrete(path, inspect.signature(type(module).forward))
            if constants is None:
                return None, "it is not called"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings of the forward do not concern this call
                tracer = make(path, leaves, rules.is_leaf)
                if rules.whole:
                    tracer.require_current_modes()
                graph = tracer.trace(module, dict(constants))
            if random.getstate() != states[0] or not torch.equal(torch.get_rng_state(), states[1]):
                raise StateError("its forward draws random numbers")
            _note_constants(module, graph)
            rules.accept(path, graph)
            return graph, ""
        except Exception as error:  # a forward may raise anything if its input is a proxy
            reasons.append(first_line(error))
        finally:
            random.setstate(states[0])
            torch.set_rng_state(states[1])
    return None, reasons[-1]


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _note_constants(module: nn.Module, graph: fx.Graph) -> None:
    """Store each tensor that the tracer set on the traced copy in the tensor's node."""
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            node.meta[CONSTANT] = getattr(module, str(node.target))


def _composite(module: nn.Module, path: str, is_leaf: IsLeaf) -> Iterator[tuple[str, nn.Module]]:
    """The direct submodules that have submodules themselves; those inside a list of modules count as direct."""
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _composite(child, full, is_leaf)
        elif (
            next(child.children(), None) is not None and not isinstance(child, _BatchNorm) and not is_leaf(child, full)
        ):
            yield full, child
