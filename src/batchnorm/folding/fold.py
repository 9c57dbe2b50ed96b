"""Folds the batch norms of each graph, and puts their replacements into the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from batchnorm.folding.flow import CONSTANT_PADS, Refused
from batchnorm.folding.modules import ChannelPad
from batchnorm.folding.norms import Affine, is_norm, rest_of
from batchnorm.folding.record import Record
from batchnorm.folding.report import Folded
from batchnorm.folding.rules import End, Scene, ahead, back, check_replaceable, check_stays, foldable_axis, padding_of
from batchnorm.folding.weights import Weights
from batchnorm.surgery import walk
from batchnorm.surgery.tracing import TracedModule


@dataclass
class Folding:
    """Collects the changes of a model, by the ids of its modules; `apply` makes them.

    Attributes:
        quantized: the only batch norm that may be folded into a linear layer, because its weights are quantized for it.
    """

    model: nn.Module
    folded: list[Folded] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    weights: dict[int, Weights] = field(default_factory=dict)
    replacements: dict[int, nn.Module] = field(default_factory=dict)
    unpadded: list[Any] = field(default_factory=list)
    quantized: dict[int, nn.Module] = field(default_factory=dict)

    def quantize(self, linear: nn.Module, weight: Tensor, norm: nn.Module) -> None:
        """Give a linear layer weights, float64, that are quantized once this batch norm is folded into them; nothing else may be."""
        self.weights[id(linear)] = Weights(linear)
        self.weights[id(linear)].weight = weight
        self.quantized[id(linear)] = norm

    def fold(self, traced: TracedModule, record: Record) -> None:
        """Fold the batch norms of a graph in the order of their calls; repeat while this makes others foldable."""
        scene = scene_of(self.model, traced, record)
        norms = [(node, name, norm) for node, (name, norm) in scene.modules.items() if is_norm(norm)]
        before = None
        while before is None or len(norms) < before:
            before = len(norms)
            norms = [(node, name, norm) for node, name, norm in norms if not self._folds(scene, node, name, norm)]

    def apply(self) -> None:
        """Change the model."""
        for weights in self.weights.values():
            weights.write()
        for convolution in self.unpadded:
            convolution.padding = (0,) * len(convolution.kernel_size)
            convolution._reversed_padding_repeated_twice = [0] * 2 * len(convolution.kernel_size)
        replace_modules(self.model, self.replacements)

    def _folds(self, scene: Scene, node: fx.Node, name: str, norm: nn.Module) -> bool:
        try:
            self._fold(scene, node, name, norm)
        except Refused as reason:
            self.left[name] = str(reason)
            return False
        self.left.pop(name, None)
        return True

    def _fold(self, scene: Scene, node: fx.Node, name: str, norm: nn.Module) -> None:
        if id(norm) in scene.shared:
            raise Refused(f"it {scene.shared[id(norm)]}")
        check_replaceable(scene, name, norm)
        if len(node.args) != 1 or set(node.kwargs) - {"residual"}:
            raise Refused("it is called with more than its input")
        axis = foldable_axis(norm, node.args[0])
        affine = Affine.of(norm)
        rest = rest_of(norm, residual="residual" in node.kwargs)
        ends, kind = self._ends(scene, node, axis, affine, rest)
        for end in ends:
            if self.quantized.get(id(end.module), norm) is not norm:
                raise Refused(f"{end.name} has quantized weights")
        for end in ends:
            if type(end.module) in CONSTANT_PADS:
                assert end.pad is not None
                scene.pads[id(end.module)] = end.pad
                self.replacements[id(end.module)] = _channel_pad(end.pad, end.module.padding, norm)  # pyright: ignore
                continue
            weights = self.weights.setdefault(id(end.module), Weights(end.module))
            if kind == "after":
                weights.fold_after(end.affine)
                continue
            weights.fold_before(end.affine)
            if end.pad is not None:
                rest = _channel_pad(end.pad, padding_of(end.module), norm)
                self.unpadded.append(end.module)
        self.replacements[id(norm)] = rest
        if type(rest) is nn.Identity:
            scene.gone.add(node)
        self.folded.append(Folded(name, tuple(end.name for end in ends), kind))

    def _ends(self, scene: Scene, node: fx.Node, axis: int, affine: Affine, rest: nn.Module) -> tuple[list[End], str]:
        """The layers that a batch norm can be folded into, and the kind of fold."""
        try:
            return list(back(scene, node.args[0], node, axis, affine)), "after"
        except Refused as refused:
            before = str(refused)
        try:
            if type(rest) is not nn.Identity:
                raise Refused("an activation or an addition follows in the same layer")
            check_stays(scene, node.args[0])
            ends = list(ahead(scene, node, axis, affine))
            _check_pads(scene, node, ends)
            _check_values(ends, scene.modules[node][1])
        except Refused as refused:
            raise Refused(f"{before}; {refused}") from None
        padded = any(end.pad is not None and type(end.module) not in CONSTANT_PADS for end in ends)
        return ends, "before, padded" if padded else "before"


def scene_of(model: nn.Module, traced: TracedModule, record: Record) -> Scene:
    """The graph of a traced module with the modules it calls, and which of them are used elsewhere too."""
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    modules = {node: (traced.full(node.target), model.get_submodule(traced.full(node.target))) for node in calls}
    in_graph = Counter(id(module) for _, module in modules.values())
    once = record.counts[id(model.get_submodule(traced.path))]
    owners = Counter(
        id(value) for module in model.modules() for value in module._parameters.values() if value is not None
    )
    read = {traced.full(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    shared = dict[int, str]()
    for name, module in modules.values():
        if not record.counts[id(module)]:
            shared[id(module)] = "is not called"
        elif in_graph[id(module)] > 1 or record.counts[id(module)] != once:
            shared[id(module)] = "is called several times"
        elif any(owners[id(value)] > 1 for value in module._parameters.values() if value is not None):
            shared[id(module)] = "shares its weights with another module"
        elif any(target.startswith(f"{name}.") for target in read):
            shared[id(module)] = "has weights that other code reads"
    return Scene(traced.graph, modules, shared, _referenced(model))


def _referenced(model: nn.Module) -> set[int]:
    """The ids of modules that plain attributes refer to, also from inside lists and other containers."""
    own = ("_parameters", "_buffers", "_modules")
    values = [value for module in model.modules() for name, value in vars(module).items() if name not in own]
    return {id(leaf) for leaf in tree_leaves(values) if isinstance(leaf, nn.Module)}


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Replace modules, given by id, in all their places; the model itself is not replaced."""
    for slot in list(walk(model)):
        if id(slot.module) in replacements and slot.parent is not None:
            slot.replace(replacements[id(slot.module)].train(slot.module.training))


def _channel_pad(pad: Tensor | None, padding: tuple[int, ...], norm: Any) -> ChannelPad:
    assert pad is not None
    return ChannelPad(pad.to(norm.running_mean.dtype), tuple(padding))


def _check_values(ends: list[End], norm: Any) -> None:
    """Check that padding values are finite in the dtypes of the layers.

    Raises:
        Refused: if one is not.
    """
    for end in ends:
        weight = getattr(end.module, "weight", None)
        for dtype in {norm.running_mean.dtype, norm.running_mean.dtype if weight is None else weight.dtype}:
            if end.pad is not None and not end.pad.to(dtype).isfinite().all():
                raise Refused(f"the padding of {end.name} would not be finite in {dtype}")


def _check_pads(scene: Scene, node: fx.Node, ends: list[End]) -> None:
    """Check that one padding in the place of the batch norm suits all layers.

    Raises:
        Refused: if several would be necessary.
    """
    padded = [end for end in ends if end.pad is not None and type(end.module) not in CONSTANT_PADS]
    if not padded:
        return
    direct = {id(scene.module_of(user)) for user in node.users}
    alike = len({padding_of(end.module) for end in padded}) == 1
    if len(padded) < len(ends) or not alike or any(id(end.module) not in direct for end in padded):
        raise Refused(f"{padded[0].name} pads, and other layers would be padded too")
