"""Merges parallel branches of one input that are summed, convolutions, batch norms and the input itself, into one convolution (RepVGG).

    W ∗ x + V ∗ x + scale · x + shift = (W + V + scale · identity) ∗ x + shift           (Ding et al. 2021, arXiv:2101.03697, figure 4)

A smaller kernel becomes a patch of a larger one if both have the same stride.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from batchnorm.folding.flow import Refused, operands, shape_of
from batchnorm.folding.fold import replace_modules, scene_of
from batchnorm.folding.norms import Affine, is_norm, not_foldable, rest_of
from batchnorm.folding.record import Record
from batchnorm.folding.report import Folded, Merged
from batchnorm.folding.rules import Scene, check_stays
from batchnorm.folding.weights import CONVOLUTIONS, Weights, kind_of, not_writable
from batchnorm.layers import BatchNorm
from batchnorm.surgery.graphs import CONSTANT
from batchnorm.surgery.rewritten import rewrite
from batchnorm.surgery.tracing import Rules, Traced, trace_module


class Branch(NamedTuple):
    """A summand that is linear in its input.

    Attributes:
        top: the node of the summand.
        adding: the node that adds it.
        source: the node of the input.
        nodes: the nodes from `top` down to the input.
        name: the name of its convolution or batch norm; "the input" if it has neither.
        module: its convolution or batch norm, or None.
    """

    top: fx.Node
    adding: fx.Node
    source: fx.Node
    nodes: tuple[fx.Node, ...]
    name: str
    module: Any


@dataclass
class Merging:
    """Merges the parallel branches of a model, and notes what was merged."""

    merged: list[Merged] = field(default_factory=list)
    folded: list[Folded] = field(default_factory=list)

    def merge(self, model: nn.Module, record: Record, traced: Traced, rules: Rules) -> None:
        """Merge the branches in the modules that sum them, which get a new forward."""
        owners = dict[str, None]()
        for each in traced.modules:
            scene = scene_of(model, each, record)
            owners |= {each.full(_owner(node)).rstrip("."): None for node in each.graph.nodes if _group(scene, node)}
        for path in owners:
            with torch.enable_grad():  # to detect code that switches gradients off
                found, _ = trace_module(model, path, rules._replace(whole=True))
            owner = model.get_submodule(path)
            if (
                found is None
                or not record.takes_tensors_only(path)
                or any(CONSTANT in node.meta for node in found.graph.nodes)
            ):
                continue
            scene = scene_of(model, found, record)
            before = len(self.merged)
            while (group := _first_group(scene)) is not None:
                self._merge(model, scene, *group)
            if len(self.merged) > before:
                found.graph.lint()
                rewrite(owner, found.graph)

    def _merge(self, model: nn.Module, scene: Scene, base: Branch, others: list[Branch]) -> None:
        weights = Weights(base.module)
        for branch in sorted(
            others, key=lambda branch: branch.module is not None
        ):  # the input first, while `adding` is still its node
            _drop(scene, branch)
            weights.add_branch(*_kernel(branch, base))
            if branch.module is not None:
                replace_modules(model, {id(branch.module): nn.Identity()})
                if is_norm(branch.module):
                    self.folded.append(Folded(branch.name, (base.name,), "parallel"))
        weights.write()
        self.merged.append(Merged(base.name, tuple(branch.name for branch in (base, *others))))


def _first_group(scene: Scene) -> tuple[Branch, list[Branch]] | None:
    """The first sum with a convolution that other branches fit into: this one, and these branches."""
    return next(filter(None, (_group(scene, node) for node in scene.graph.nodes)), None)


def _group(scene: Scene, node: fx.Node) -> tuple[Branch, list[Branch]] | None:
    """For the outermost node of a sum: its largest convolution that other branches fit into, and these branches; else None."""
    if not _adds(node) or any(_adds(user) and len(node.users) == 1 for user in node.users):
        return None
    branches = sorted((_branch(scene, *term) for term in _terms(node)), key=lambda branch: -_size(branch.module))
    for number, base in enumerate(branches):
        if kind_of(base.module) not in CONVOLUTIONS:
            break
        others = [branch for branch in branches[number + 1 :] if branch.source is base.source and _fits(branch, base)]
        inputs = [branch for branch in others if branch.module is None]
        others = [branch for branch in others if branch not in inputs[1:]]
        try:
            check_stays(scene, base.source)
        except Refused:
            continue
        if others:
            return base, others
    return None


def _adds(node: fx.Node) -> bool:
    pair = operands(node)
    return pair is not None and not pair[1] and pair[0][0] is not pair[0][1]


def _terms(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The summands of a sum, each with the node that adds it; inner sums with one user are included."""
    terms = list[tuple[fx.Node, fx.Node]]()
    for value in node.args:
        assert isinstance(value, fx.Node)
        terms += _terms(value) if _adds(value) and len(value.users) == 1 else [(value, node)]
    return terms


def _branch(scene: Scene, top: fx.Node, adding: fx.Node) -> Branch:
    nodes, value = list[fx.Node](), top
    while len(value.users) == 1:
        name, module = scene.name_of(value), scene.module_of(value)
        linear = module is not None and _is_linear(scene, value, module)
        if not linear and not scene.passes(value):
            break
        nodes.append(value)
        below = value.args[0]
        assert isinstance(below, fx.Node)
        if linear:
            return Branch(top, adding, below, tuple(nodes), name, module)
        value = below
    return Branch(top, adding, value, tuple(nodes), "the input", None)


def _is_linear(scene: Scene, node: fx.Node, module: Any) -> bool:
    """Whether a node calls a convolution or a batch norm that can be merged."""
    if id(module) in scene.shared or len(node.args) != 1 or node.kwargs:
        return False
    if kind_of(module) in CONVOLUTIONS:
        return module.padding_mode == "zeros" and not_writable(module) is None
    if not is_norm(module):
        return False
    options = isinstance(module, BatchNorm) and (module.activation is not None or module.channel_axis != 1)
    shape = shape_of(node.args[0]) or ()
    return not options and type(rest_of(module)) is nn.Identity and not_foldable(module, shape, 1) is None


def _size(module: Any) -> int:
    return module.weight[0, 0].numel() if kind_of(module) in CONVOLUTIONS else 0


def _fits(branch: Branch, base: Branch) -> bool:
    """Whether the branch's kernel fits into the base's."""
    large, small = base.module, branch.module
    if kind_of(small) not in CONVOLUTIONS:
        batched = len(shape_of(base.source) or ()) == large.weight.dim()
        alike = batched and large.in_channels == large.out_channels and set(large.stride) == {1}
    else:
        alike = small.stride == large.stride and small.groups == large.groups
    if not alike:
        return False
    for size, dilation, offset, own, spread in _axes(branch, base):
        if offset % dilation or not 0 <= offset // dilation <= size - own or (own > 1 and spread != dilation):
            return False
    return True


def _axes(branch: Branch, base: Branch) -> list[tuple[int, int, int, int, int]]:
    """For each axis: kernel size and dilation of the base, offset of the branch in it, size and dilation of the branch."""
    large, small = base.module, branch.module
    rank = large.weight.dim() - 2
    if kind_of(small) in CONVOLUTIONS:
        sizes, dilations, padding = small.kernel_size, small.dilation, _left(small)
    else:
        sizes, dilations, padding = (1,) * rank, (1,) * rank, (0,) * rank
    offsets = [far - near for far, near in zip(_left(large), padding, strict=True)]
    return list(zip(large.kernel_size, large.dilation, offsets, sizes, dilations, strict=True))


def _left(convolution: Any) -> tuple[int, ...]:
    """The padding at the start of each axis."""
    return tuple(convolution._reversed_padding_repeated_twice[::2][::-1])


def _kernel(branch: Branch, base: Branch) -> tuple[Weights, tuple[int, ...]]:
    """The branch as a convolution with the base's groups, and its offsets in the base's kernel."""
    offsets = tuple(offset // dilation for _, dilation, offset, _, _ in _axes(branch, base))
    if kind_of(branch.module) in CONVOLUTIONS:
        return Weights(branch.module), offsets
    C, groups = base.module.out_channels, base.module.groups
    affine = (
        Affine.of(branch.module)
        if branch.module is not None
        else Affine(torch.ones(C).double(), torch.zeros(C).double())
    )
    like = type(base.module)(C, C, 1, groups=groups, device=affine.scale.device, dtype=torch.float64)
    weights = Weights(like)
    channels = torch.arange(C, device=affine.scale.device)
    weights.weight = torch.zeros_like(weights.weight)
    weights.weight[channels, channels % (C // groups)] = affine.scale.reshape(-1, *(1,) * len(offsets))
    weights.bias = affine.shift
    return weights, offsets


def _drop(scene: Scene, branch: Branch) -> None:
    """Remove a summand from its sum."""
    top = branch.top
    # the input has several users; the single user of a branch may have changed when another summand was removed
    adding = branch.adding if branch.module is None else next(iter(top.users))
    (other,) = (value for value in adding.args if value is not top)
    assert isinstance(other, fx.Node)
    adding.replace_all_uses_with(other)
    scene.graph.erase_node(adding)
    for node in branch.nodes:
        if not node.users:
            scene.graph.erase_node(node)


def _owner(node: fx.Node) -> str:
    """The submodule of the traced module whose forward created a node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""
