"""`fuse`: batch norms apply the activation, the addition, or both, that follow them in the forward of a module.

A module whose forward contains such a pattern gets a new forward, generated from its graph. It stays the same object of the same class, and
so do its submodules. Inner modules are processed before the modules that contain them.
"""

from __future__ import annotations

import collections
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from batchnorm.kernels import Activation, from_module
from batchnorm.kernels.activation import OF_FUNCTION
from batchnorm.layers import BatchNorm
from batchnorm.logs import logger
from batchnorm.surgery.absorb import absorb_activations
from batchnorm.surgery.exchange import convert_layers
from batchnorm.surgery.graphs import ADDITIONS, CONSTANT, in_place, uses
from batchnorm.surgery.report import Report
from batchnorm.surgery.rewritten import Rewritten, normalize_and_apply
from batchnorm.surgery.subclasses import does_more
from batchnorm.surgery.tracing import Rules, first_line, trace_module
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import is_sequential, is_watched, slots_of


class Pattern(NamedTuple):
    """A batch norm with the addition and the activation that follow it.

    Attributes:
        norm: the call of the batch norm.
        add: the addition of another value to its output, or None.
        act: the call of the activation, or None.
        activation: this activation, or None.
    """

    norm: fx.Node
    add: fx.Node | None
    act: fx.Node | None
    activation: Activation | None

    @property
    def last(self) -> fx.Node:
        found = self.act or self.add
        assert found is not None
        return found


@transactional()
def fuse(model: nn.Module) -> nn.Module:
    """Let each batch norm apply the addition and the activation that follow it in the same pass, in place, and return the model.

    First, layers become ours, as with `convert`. In an `nn.Sequential` each batch norm applies the activation that directly follows it,
    and subclasses apply an activation that they call themselves. Then the forwards of the modules are traced (`torch.fx`): batch norm +
    activation, batch norm + addition and batch norm + addition + activation become one call. Outputs, gradients, state_dict and
    parameters do not change; `revert` undoes it.

    A module with such a pattern gets its own forward, which calls the batch norms below it directly. The module's original forward runs
    again if a module in between is replaced or gets hooks. A module does not change if its forward cannot be traced, takes optional
    arguments, draws random numbers, differs between training and inference, writes attributes or buffers, switches gradients or
    autocast on or off, checkpoints, or calls an `autograd.Function`, or if the module cannot be copied. A pattern does not change if its
    modules have hooks or are used several times, or if something writes in place before the addition. The logger `batchnorm` says
    how many batch norms now apply something, which do not, and why.

    The added value is expanded to the shape of the batch norm's input. If the sum has another shape or dtype, the addition stays
    separate.

    Raises:
        ArgumentError: if model is not a module.
    """
    fuse_layers(model).log()
    return model


def fuse_layers(model: nn.Module, converted: Report | None = None) -> Report:
    """Fuse a model and return the report; `converted` is the report of `convert_layers`, if it was already called."""
    slots, report = slots_of(model), Report("fuse", "apply what follows them")
    if converted is None:
        converted = convert_layers(slots, Report("fuse", "converted"))
        report.left = converted.left
    report.total = converted.total
    absorb_activations(slots, report)
    places = collections.Counter(id(slot.module) for slot in slots)
    # children come after their parents; for a module in several places, the last is enough
    for slot in {id(slot.module): slot for slot in reversed(slots)}.values():
        owner, name = slot.module, slot.path or "the model"
        norms = [module for module in owner.modules() if isinstance(module, BatchNorm) and module is not owner]
        if not norms or is_sequential(owner) or isinstance(owner, (nn.ModuleList, nn.ModuleDict, BatchNorm)):
            continue
        rewritten = owner.__dict__.get("forward")
        if isinstance(rewritten, Rewritten):
            report.already += len(rewritten.applies)
            continue
        reason = _fuse_in(owner, name, places, report)
        if reason:
            report.leave(name, reason)
    return report


def _fuse_in(owner: nn.Module, name: str, places: collections.Counter[int], report: Report) -> str:
    """Fuse the patterns in the forward of this module; return the reason if that is impossible, else an empty string."""
    reason = _not_rewritable(owner)
    if reason:
        return reason
    graph, reason, _ = _graph(owner, lambda _: False, whole=False)
    if graph is None:
        return reason
    patterns = [pattern for pattern in _patterns(owner, graph, places) if _stays(owner, pattern)]
    if not patterns:
        return ""
    # trace again, now with each module that contains no pattern as one call
    entered = _ancestors(pattern.norm.target for pattern in patterns)
    graph, reason, passed = _graph(owner, lambda name: name not in entered, whole=True)
    if graph is None:
        return reason
    # only patterns of the first trace: modules that are one call now hide writes in place
    found = {(pattern.norm.target, pattern.add is None) for pattern in patterns}
    again = _patterns(owner, graph, places)
    patterns = [pattern for pattern in again if (pattern.norm.target, pattern.add is None) in found]
    if not patterns:
        return ""
    try:
        rewritten = _rewritten(owner, graph, patterns, passed | _ancestors(pattern.norm.target for pattern in patterns))
    except Exception as error:  # the code of a graph may name something that cannot be imported
        return f"its graph cannot become a function: {first_line(error)}"
    owner.forward = rewritten
    for target, what in rewritten.applies.items():
        report.changed.append(f"{name}.{target}")
        logger.info("fuse: in %s, %s now applies %s", name, target, what)
    return ""


def _rewritten(owner: nn.Module, graph: fx.Graph, patterns: list[Pattern], passed: set[str]) -> Rewritten:
    applies = dict[str, str]()
    for pattern in patterns:
        norm, activation, given = pattern.norm, pattern.activation, dict[str, Any]()
        if pattern.add is not None:
            (given["residual"],) = (value for value in pattern.add.args if value is not norm)
        if activation is not None:
            given["activation"] = activation.name
            if activation.name == "leaky_relu":
                given["slope"] = activation.negative_slope
            if pattern.act is not None and pattern.act.op == "call_module":
                passed.add(str(pattern.act.target))
        with graph.inserting_after(pattern.add or norm):  # the added value may be computed after the batch norm
            called = graph.create_node("get_attr", str(norm.target))
        with graph.inserting_after(called):
            fused = graph.call_function(normalize_and_apply, (called, *norm.args), given)
        pattern.last.replace_all_uses_with(fused)
        for node in filter(None, (pattern.act, pattern.add, norm)):
            graph.erase_node(node)
        applies[str(norm.target)] = " and ".join(filter(None, [pattern.add and "an addition", str(activation or "")]))
    graph.lint()
    return Rewritten(owner, graph, tuple(sorted(passed)), applies)


def _patterns(owner: nn.Module, graph: fx.Graph, places: collections.Counter[int]) -> list[Pattern]:
    """The patterns of a graph, including those with writes in between."""
    calls = collections.Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found, taken = list[Pattern](), set[fx.Node]()
    for node in graph.nodes:
        layer = owner.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(layer, BatchNorm) or len(node.args) != 1 or node.kwargs:
            continue
        alone = calls[node.target] == places[id(layer)] == 1 and node.target not in read
        if layer.activation is not None or does_more(layer) or is_watched(layer) or not alone:
            continue
        pattern = _pattern(owner, node, taken)
        if pattern is not None:
            found.append(pattern)
            taken |= {pattern.last, *([pattern.add] if pattern.add else [])}
    return found


def _pattern(owner: nn.Module, norm: fx.Node, taken: set[fx.Node]) -> Pattern | None:
    user = _only_user(norm)
    add = user if user is not None and user not in taken and _adds(user, norm) else None
    user = _only_user(add or norm)
    activation = None if user is None or user in taken else _activation(owner, user)
    act = None if activation is None else user
    return None if add is None and act is None else Pattern(norm, add, act, activation)


def _only_user(node: fx.Node) -> fx.Node | None:
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and uses(user, node) == 1 else None


def _adds(node: fx.Node, norm: fx.Node) -> bool:
    """Whether a node adds another value to the batch norm's output, without writing into that value."""
    is_addition = node.target in ADDITIONS if node.op == "call_function" else node.target in ("add", "add_")
    if node.op not in ("call_function", "call_method") or not is_addition or node.kwargs or len(node.args) != 2:
        return False
    other = node.args[1] if node.args[0] is norm else node.args[0]
    # other nodes may read the value that it writes into
    return isinstance(other, fx.Node) and not (in_place(node, None) and node.args[0] is other)


def _stays(owner: nn.Module, pattern: Pattern) -> bool:
    """Whether no node may write into the batch norm's input before the addition, where the fused call reads it."""
    between = itertools.takewhile(lambda each: each is not (pattern.add or pattern.norm.next), _after(pattern.norm))
    return not any(_may_write(each, _module(owner, each)) for each in between)


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op != "root":
        node = node.next
        yield node


def _may_write(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may write into the input of the batch norm before it, perhaps through a view."""
    known = module is None or all(
        isinstance(each, BatchNorm) or type(each).__module__.startswith(("torch.nn.", "batchnorm."))
        for each in module.modules()
    )
    return not known or in_place(node, module)


def _activation(owner: nn.Module, node: fx.Node) -> Activation | None:
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        return None if is_watched(module) else from_module(module)
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    if node.op == "call_function" and node.target in OF_FUNCTION:
        return OF_FUNCTION[node.target]
    return Activation("relu") if node.op == "call_method" and node.target in ("relu", "relu_") else None


def _module(owner: nn.Module, node: fx.Node) -> nn.Module | None:
    return owner.get_submodule(str(node.target)) if node.op == "call_module" else None


def _not_rewritable(owner: nn.Module) -> str:
    if "forward" in owner.__dict__:
        return "it has a forward of its own"
    named = list(inspect.signature(type(owner).forward).parameters.values())[1:]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    optional = any(given.default is not inspect.Parameter.empty or given.kind not in plain for given in named)
    return "its forward takes optional arguments" if optional else ""


def _graph(owner: nn.Module, is_whole: Callable[[str], bool], *, whole: bool) -> tuple[fx.Graph | None, str, set[str]]:
    """The graph of a module's forward, which must be the same in training and inference, or None and the reason.

    With `whole`, it must contain everything that the forward does. The third value is the names of the identities that it leaves out.
    """

    def is_leaf(module: nn.Module, name: str) -> bool:
        return next(module.children(), None) is None or is_whole(name)

    graphs = list[fx.Graph]()
    flags = [(module, module.training) for module in owner.modules()]
    try:
        for training in (True, False):
            for module, _ in flags:
                module.training = training
            with torch.set_grad_enabled(training):  # once on, once off, to detect every switch in the forward
                traced, reason = trace_module(owner, "", Rules(lambda *_: {}, is_leaf, lambda *_: None, whole=whole))
            if traced is None:
                return None, reason, set()
            graphs.append(traced.graph)
    finally:
        for module, training in flags:
            module.training = training
    if graphs[0].python_code("self").src != graphs[1].python_code("self").src:
        return None, "its forward differs between training and inference", set()
    if any(CONSTANT in node.meta for node in graphs[0].nodes):
        return None, "its forward creates tensors", set()
    return graphs[0], "", _leave_out_identities(owner, graphs[0])


def _leave_out_identities(owner: nn.Module, graph: fx.Graph) -> set[str]:
    left = set[str]()
    for node in graph.nodes:
        module = _module(owner, node)
        if type(module) is nn.Identity and not is_watched(module) and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            left.add(str(node.target))
    return left


def _ancestors(targets: Iterable[Any]) -> set[str]:
    """The names of all modules that contain these."""
    split = [str(target).split(".") for target in targets]
    return {".".join(names[:depth]) for names in split for depth in range(1, len(names))}
