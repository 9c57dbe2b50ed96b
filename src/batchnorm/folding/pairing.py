"""Finds the batch norms that directly follow a linear layer, in training too, and makes pairs of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch import fx, nn

from batchnorm.folding.flow import Refused, shape_of
from batchnorm.folding.fold import replace_modules, scene_of
from batchnorm.folding.norms import Affine, is_norm
from batchnorm.folding.pairs import FoldedPair, joined
from batchnorm.folding.record import Record
from batchnorm.folding.report import Folded
from batchnorm.folding.rules import Scene, check_replaceable, end_at, foldable_axis
from batchnorm.folding.weights import LINEAR, can_fold_after, kind_of
from batchnorm.surgery.graphs import in_place, readers, uses
from batchnorm.surgery.tracing import TracedModule


@dataclass
class Pairing:
    """Collects the pairs of a model; `apply` puts them into it."""

    model: nn.Module
    folded: list[Folded] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    replacements: dict[int, nn.Module] = field(default_factory=dict)

    @property
    def pairs(self) -> list[FoldedPair]:
        return [module for module in self.replacements.values() if isinstance(module, FoldedPair)]

    def fold(self, traced: TracedModule, record: Record) -> None:
        """Find the pairs of a graph."""
        scene = scene_of(self.model, traced, record)
        for node, (name, norm) in scene.modules.items():
            if is_norm(norm):
                try:
                    self._fold(scene, node, name, norm)
                except Refused as reason:
                    self.left[name] = str(reason)

    def apply(self) -> None:
        """Change the model."""
        replace_modules(self.model, self.replacements)

    def _fold(self, scene: Scene, node: fx.Node, name: str, norm: nn.Module) -> None:
        if id(norm) in scene.shared:
            raise Refused(f"it {scene.shared[id(norm)]}")
        check_replaceable(scene, name, norm)
        axis = foldable_axis(norm, node.args[0] if node.args else None)
        producer = _producer(scene, node)
        end = end_at(scene, producer, axis, Affine.of(norm))
        check_replaceable(scene, end.name, end.module)
        more = len(node.args) > 1 or bool(node.kwargs)  # a residual, a mask: the pair goes where they arrive
        if more:
            _check_input_stays(scene, producer, node)
        self.replacements |= joined(end.module, norm, at_batch_norm=more)
        self.folded.append(Folded(name, (end.name,), "in training"))


def _producer(scene: Scene, node: fx.Node) -> fx.Node:
    """The call of the linear layer whose output a batch norm reads, and nobody else does.

    Raises:
        Refused: if there is none.
    """
    user, value = node, node.args[0]
    while isinstance(value, fx.Node):
        name, module = scene.name_of(value), scene.module_of(value)
        if readers(value) != [user] or uses(user, value) > 1:
            raise Refused(f"the output of {name} also goes elsewhere")
        if type(module) is nn.Identity:
            user, value = value, value.args[0]
            continue
        if not isinstance(module, LINEAR):
            raise Refused(
                f"before it is {name}" if module is None else f"before it is {name}, a {type(module).__name__}"
            )
        if kind_of(module) is None and not can_fold_after(module, shape_of(value.args[0]) or ()):
            raise Refused(f"before it is {name}, a {type(module).__name__} that is not linear in its weights")
        if len(value.args) != 1 or value.kwargs:
            raise Refused(f"{name} is called with more than its input")
        return value
    raise Refused("its input is not a tensor")


def _check_input_stays(scene: Scene, producer: fx.Node, node: fx.Node) -> None:
    """Check that nothing between two calls may write into the input of the first, or asks for the shape of its output.

    Raises:
        Refused: if something does.
    """
    nodes = list(scene.graph.nodes)
    between = itertools.islice(nodes, nodes.index(producer) + 1, nodes.index(node))
    for each in between:
        if in_place(each, scene.module_of(each)):
            raise Refused(f"{scene.name_of(each)} writes in place between it and {scene.name_of(producer)}")
    if len(producer.users) > 1:
        raise Refused(f"the shape of the output of {scene.name_of(producer)} is read")
