"""Letting batch norms apply what follows them in a model's own code: an activation, an addition, or both.

Where a module's forward holds such a pattern, that module alone gets a forward made of its graph, in place of its class's; the module
stays the same object, of the same class, and so do all below it. Modules are looked at from the innermost outward.
"""

from __future__ import annotations

import collections
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from batchnorm.kernels import Activation, from_module
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

_NAMES = ("relu", "relu6", "silu", "hardswish")
_FUNCTIONS: dict[Any, str] = {
    **{getattr(F, name): name for name in _NAMES},
    **dict.fromkeys((torch.relu, torch.relu_, F.relu_), "relu"),
}


class Pattern(NamedTuple):
    """A batch norm and what follows it.

    Attributes:
        norm: its call.
        add: the addition of something else to its output, or None.
        act: the activation of that, or None.
        activation: which one.
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
    """Let each batch norm apply the addition and the activation that follow it, in the same pass; in place, and return the model.

    First layers become ours, as with `convert`. In an `nn.Sequential` they take in the activation that directly follows them, and so do
    subclasses that call an activation themselves. Then the forwards of the model's modules are traced (`torch.fx`): batch norm +
    activation, batch norm + addition and batch norm + addition + activation become one call. Outputs, gradients, state_dict and
    parameters stay what they were; `revert` goes back.

    A module with such a pattern gets a forward of its own, which calls the modules that take part itself: hooks and code that come
    later to a module between it and them are passed by. A module is left as it is where its forward cannot be traced, takes
    optional arguments, draws random numbers, goes other ways in training than in inference, writes attributes or buffers, switches
    gradients or autocast on or off, checkpoints, calls an `autograd.Function`, or where the module cannot be copied; so are
    patterns with modules that have hooks, or are used several times, and additions with something in between that writes in place.
    The logger `batchnorm` says how many batch norms now apply something, what was left, and why.

    What is added is expanded to the shape of the batch norm's input; where the sum has another shape or dtype, it is added
    afterwards, as before.

    Raises:
        ArgumentError: if model is not a module.
    """
    fuse_layers(model).log()
    return model


def fuse_layers(model: nn.Module, converted: Report | None = None) -> Report:
    """Do what `fuse` says, and report it; `converted` says that, and how, the layers were converted already."""
    slots, report = slots_of(model), Report("fuse", "apply what follows them")
    if converted is None:
        converted = convert_layers(slots, Report("fuse", "converted"))
        report.left = converted.left
    report.total = converted.total
    absorb_activations(slots, report)
    places = collections.Counter(id(slot.module) for slot in slots)
    # children come after their parents; of a module in several places, the last is enough
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
    """Fuse what the forward of this module holds, and return why that cannot be done, or nothing."""
    reason = _not_rewritable(owner)
    if reason:
        return reason
    graph, reason, _ = _graph(owner, lambda _: False, whole=False)
    if graph is None:
        return reason
    patterns = [pattern for pattern in _patterns(owner, graph, places) if _stays(owner, pattern)]
    if not patterns:
        return ""
    # once more, now with everything that takes no part as one call each, which stays a call
    entered = _ways(pattern.norm.target for pattern in patterns)
    graph, reason, passed = _graph(owner, lambda name: name not in entered, whole=True)
    if graph is None:
        return reason
    # only what was found before: what is one call now does not show who writes into what
    found = {(pattern.norm.target, pattern.add is None) for pattern in patterns}
    again = _patterns(owner, graph, places)
    patterns = [pattern for pattern in again if (pattern.norm.target, pattern.add is None) in found]
    if not patterns:
        return ""
    try:
        rewritten = _rewritten(owner, graph, patterns, passed | _ways(pattern.norm.target for pattern in patterns))
    except Exception as error:  # the code of a graph may name what cannot be imported
        return f"no function can be made of its graph: {first_line(error)}"
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
        with graph.inserting_after(pattern.add or norm):  # what is added may be computed after the batch norm was
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
    """The patterns of a graph, whether or not somebody writes in between."""
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
    """Whether a node adds another value to the batch norm's output, and does not write into that."""
    is_addition = node.target in ADDITIONS if node.op == "call_function" else node.target in ("add", "add_")
    if node.op not in ("call_function", "call_method") or not is_addition or node.kwargs or len(node.args) != 2:
        return False
    other = node.args[1] if node.args[0] is norm else node.args[0]
    # a value that changes may be seen by others
    return isinstance(other, fx.Node) and not (in_place(node, None) and node.args[0] is other)


def _stays(owner: nn.Module, pattern: Pattern) -> bool:
    """Whether nobody may write into what the batch norm reads before the addition, where it would be read now."""
    between = itertools.takewhile(lambda each: each is not (pattern.add or pattern.norm.next), _after(pattern.norm))
    return not any(_may_write(each, _module(owner, each)) for each in between)


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while node.next.op != "root":
        node = node.next
        yield node


def _may_write(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may write into what the batch norm before it reads; views of that have other names."""
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
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return Activation(_FUNCTIONS[node.target])
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
    """The graph of a module's forward, the same in training and in inference; None, and why, where there is none.

    With `whole`, it must hold all that the forward does. Last come the names of the identities that it leaves out.
    """

    def is_leaf(module: nn.Module, name: str) -> bool:
        return next(module.children(), None) is None or is_whole(name)

    graphs = list[fx.Graph]()
    flags = [(module, module.training) for module in owner.modules()]
    try:
        for training in (True, False):
            for module, _ in flags:
                module.training = training
            with torch.set_grad_enabled(training):  # once on, once off: then each switch in the forward is noticed
                part, reason = trace_module(owner, "", Rules(lambda *_: {}, is_leaf, lambda *_: None, whole=whole))
            if part is None:
                return None, reason, set()
            graphs.append(part.graph)
    finally:
        for module, training in flags:
            module.training = training
    if graphs[0].python_code("self").src != graphs[1].python_code("self").src:
        return None, "its forward goes other ways in training", set()
    if any(CONSTANT in node.meta for node in graphs[0].nodes):
        return None, "its forward makes tensors of its own", set()
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


def _ways(targets: Iterable[Any]) -> set[str]:
    """The names of all modules on the way to these."""
    parts = [str(target).split(".") for target in targets]
    return {".".join(names[:depth]) for names in parts for depth in range(1, len(names))}
