"""Finds the linear layers that the affine function of a batch norm can be folded into: back before it, or ahead after it.

The search passes functions that commute with an affine function of the channels, and ends in linear layers. It finds all ends before
anything changes; if a path does not end in a linear layer, it raises `Refused` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm.folding.flow import (
    CONSTANT_PADS,
    Refused,
    averages,
    concatenated,
    flattened,
    is_identity,
    moved,
    operands,
    shape_of,
)
from batchnorm.folding.norms import Affine, channel_axis_of, not_foldable
from batchnorm.folding.weights import CONVOLUTIONS, TRANSPOSED, can_fold_after, channel_axis, kind_of, not_writable
from batchnorm.surgery.graphs import in_place, readers, uses


@dataclass(frozen=True)
class End:
    """A layer that an affine function can be folded into.

    Attributes:
        name: the name of the layer in the model.
        affine: the affine function.
        pad: the value with which the input of the layer must be padded, (C,); None if padding does not matter.
    """

    name: str
    module: nn.Module
    affine: Affine
    pad: Tensor | None = None


@dataclass
class Scene:
    """A graph with the modules it calls.

    Attributes:
        modules: the name and the module of each call.
        shared: for modules that are used elsewhere too and must not change, by id, the reason.
        referenced: ids of modules that plain attributes refer to; such code would not call a replacement.
        gone: calls of folded batch norms, which now return their first argument.
        pads: the new values of paddings, (C,), by the id of the module.
    """

    graph: fx.Graph
    modules: dict[fx.Node, tuple[str, nn.Module]]
    shared: dict[int, str]
    referenced: set[int] = field(default_factory=set)
    gone: set[fx.Node] = field(default_factory=set)
    pads: dict[int, Tensor] = field(default_factory=dict)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node][1] if node in self.modules else None

    def name_of(self, node: fx.Node) -> str:
        if node in self.modules:
            return self.modules[node][0]
        return {"placeholder": "the input", "output": "the output"}.get(
            node.op, getattr(node.target, "__name__", str(node.target))
        )

    def passes(self, node: fx.Node) -> bool:
        """Whether a node returns its first argument."""
        return node in self.gone or is_identity(node, self.module_of(node))


def back(scene: Scene, value: Any, user: fx.Node, axis: int, affine: Affine) -> Iterator[End]:
    """Find the layers before `user`, which applies the affine function to `value`, that it can be folded into.

    Raises:
        Refused: if a path does not end in a linear layer.
    """
    if not isinstance(value, fx.Node) or shape_of(value) is None:
        raise Refused("its input is not a tensor")
    name, module = scene.name_of(value), scene.module_of(value)
    if readers(value) != [user] or uses(user, value) > 1:
        raise Refused(f"the output of {name} also goes elsewhere")
    if scene.passes(value):
        yield from back(scene, value.args[0], value, axis, affine)
        return
    if module is not None and kind_of(module) is not None:
        yield end_at(scene, value, axis, affine)
        return
    if module is not None and can_fold_after(module, shape_of(value.args[0]) or ()):
        yield end_at(scene, value, axis, affine)
        return
    if averages(value, module, axis, positive=bool((affine.scale >= 0).all())):
        yield from back(scene, value.args[0], value, axis, affine)
        return
    pair = operands(value)
    if pair is not None:
        unshifted = Affine(affine.scale, torch.zeros_like(affine.shift))
        yield from back(scene, pair[0][0], value, axis, affine)
        yield from back(scene, pair[0][1], value, axis, unshifted)
        return
    joined = concatenated(value)
    if joined is not None:
        yield from _split(scene, value, *joined, axis, affine)
        return
    for before, after in (moved(value, module) or {}).items():
        if after == axis:
            yield from back(scene, value.args[0], value, before, affine)
            return
    raise Refused(f"before it is {name}" if module is None else f"before it is {name}, a {type(module).__name__}")


def _split(scene: Scene, value: fx.Node, joined: list[fx.Node], joint: int, axis: int, affine: Affine) -> Iterator[End]:
    """Find the layers before a concatenation; each input gets its slice of the affine function."""
    start = 0
    for each in joined:
        size = (shape_of(each) or (0,) * (joint + 1))[joint]
        chosen = slice(start, start + size) if joint == axis else slice(None)
        start += size
        yield from back(scene, each, value, axis, Affine(affine.scale[chosen], affine.shift[chosen]))


def ahead(scene: Scene, value: fx.Node, axis: int, affine: Affine) -> Iterator[End]:
    """Find the layers after `value`, the output of the affine function, that it can be folded into.

    Raises:
        Refused: if a path does not end in a linear layer.
    """
    users = readers(value)
    if not users:
        raise Refused("its output is not used")
    for user in users:
        name, module = scene.name_of(user), scene.module_of(user)
        if not user.args or user.args[0] is not value or uses(user, value) > 1:
            raise Refused(f"after it is {name}")
        if scene.passes(user) and not in_place(user, module):
            yield from ahead(scene, user, axis, affine)
        elif module is not None and kind_of(module) is not None:
            yield end_at(scene, user, axis, affine, before=True)
        elif type(module) in CONSTANT_PADS:
            yield from _through_pad(scene, user, module, axis, affine)
        elif averages(user, module, axis, positive=bool((affine.scale >= 0).all())):
            yield from ahead(scene, user, axis, affine)
        elif (there := (moved(user, module) or {}).get(axis)) is not None:
            yield from ahead(scene, user, there, affine)
        elif (flat := flattened(user, module, axis)) is not None:
            there, each = flat
            repeated = Affine(affine.scale.repeat_interleave(each), affine.shift.repeat_interleave(each))
            yield from ahead(scene, user, there, repeated)
        else:
            raise Refused(f"after it is {name}" if module is None else f"after it is {name}, a {type(module).__name__}")


def _through_pad(scene: Scene, node: fx.Node, module: Any, axis: int, affine: Affine) -> Iterator[End]:
    """Fold into the layers after a constant padding, whose value becomes the preimage of the old one."""
    name = scene.name_of(node)
    padding = module.padding
    if axis != len(shape_of(node) or ()) - len(padding) // 2 - 1:
        raise Refused(f"{name} pads its channels")
    if id(module) in scene.shared:
        raise Refused(f"{name} {scene.shared[id(module)]}")
    check_replaceable(scene, name, module)
    if min(padding) < 0:
        raise Refused(f"{name} cuts off what it does not pad")
    value = scene.pads.get(id(module), getattr(module, "value", 0.0))
    yield End(name, module, affine, _preimage(affine, value, name))
    yield from ahead(scene, node, axis, affine)


def end_at(scene: Scene, node: fx.Node, axis: int, affine: Affine, *, before: bool = False) -> End:
    """The end of a path, a linear layer.

    Raises:
        Refused: if the affine function cannot be folded into it.
    """
    name, module = scene.modules[node]
    kind = kind_of(module)
    of = node.args[0] if before else node
    rank = len(shape_of(of) or ())
    if not rank or axis != channel_axis(module, rank):
        raise Refused(
            f"the channels are on axis {axis} of {rank}, which is not the channel axis of {name}, a {type(module).__name__}"
        )
    reason = not_writable(module)
    if reason is not None:
        raise Refused(f"{name} cannot absorb it: {reason}")
    if id(module) in scene.shared:
        raise Refused(f"{name} {scene.shared[id(module)]}")
    if not before:
        return End(name, module, affine)
    if kind in TRANSPOSED and affine.shift.any():
        raise Refused(f"{name}, a {type(module).__name__}, spreads the shift unevenly")
    pad = None
    if kind in CONVOLUTIONS and module.padding_mode == "zeros" and any(padding_of(module)) and affine.shift.any():
        pad = _preimage(affine, 0.0, name)
    return End(name, module, affine, pad)


def _preimage(affine: Affine, value: float | Tensor, name: str) -> Tensor:
    """The input for which the affine function returns `value`, (C,)."""
    if not affine.scale.all():
        wanted = "its value" if isinstance(value, Tensor) else f"{value:g}"
        raise Refused(f"a channel with scale 0 has no padding for {name} that becomes {wanted}")
    return (value - affine.shift) / affine.scale


def padding_of(convolution: Any) -> tuple[int, ...]:
    """The padding of a convolution, as `torch.nn.functional.pad` expects it."""
    return tuple(convolution._reversed_padding_repeated_twice)


def foldable_axis(norm: Any, value: Any) -> int:
    """The axis of the channels in the input of a batch norm that can be folded.

    Raises:
        Refused: if it cannot be.
    """
    shape = shape_of(value)
    if shape is None:
        raise Refused("its input is not a tensor")
    axis = channel_axis_of(norm, len(shape))
    reason = not_foldable(norm, shape, axis)
    if reason is not None:
        raise Refused(reason)
    return axis


def check_replaceable(scene: Scene, name: str, module: nn.Module) -> None:
    """Check that no plain attribute refers to a module, because code that uses it would not call a replacement.

    Raises:
        Refused: if one does.
    """
    if id(module) in scene.referenced:
        raise Refused(f"a plain attribute refers to {name} too, so the model would still call it")


def check_stays(scene: Scene, value: Any) -> None:
    """Check that no node writes into a value, because later readers would read something else.

    Raises:
        Refused: naming the node that writes.
    """
    for user in value.users if isinstance(value, fx.Node) else ():
        if in_place(user, scene.module_of(user)):
            raise Refused(f"{scene.name_of(user)} writes into its input")
