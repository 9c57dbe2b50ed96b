"""The walker of all surgery: yields every place of a module in a model, shared modules and cycles included."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from batchnorm.errors import ArgumentError

_AFFINE = ("weight", "bias", "running_mean", "running_var")


class Slot(NamedTuple):
    """The place of a module in a model. A module with two parents has two slots.

    Attributes:
        path: its name in the model, "" for the root.
        parent: the module that contains it; None for the root.
        name: its name in the parent.
        module: the module itself.
    """

    path: str
    parent: nn.Module | None
    name: str
    module: nn.Module

    def replace(self, module: nn.Module) -> None:
        """Put another module in this place, which must not be the root."""
        assert self.parent is not None
        self.parent._modules[self.name] = module


def walk(model: nn.Module) -> Iterator[Slot]:
    """Every slot of a model, parents first, each parent once: shared modules appear in every slot, cycles end."""
    visited: set[int] = set()

    def visit(slot: Slot) -> Iterator[Slot]:
        yield slot
        if id(slot.module) in visited:
            return
        visited.add(id(slot.module))
        for name, child in slot.module._modules.items():  # named_children leaves out a second slot of the same child
            if child is not None:
                yield from visit(Slot(f"{slot.path}.{name}" if slot.path else name, slot.module, name, child))

    yield from visit(Slot("", None, "", model))


def slots_of(model: nn.Module) -> list[Slot]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    return list(walk(model))


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Each batch norm of a model, torch's and ours, once, by the first of its names; "the model" if it is the model itself.

    Raises:
        ArgumentError: if model is not a module.
    """
    found: dict[int, tuple[str, _BatchNorm]] = {}
    for slot in slots_of(model):
        if isinstance(slot.module, _BatchNorm):
            found.setdefault(id(slot.module), (slot.path or "the model", slot.module))
    return dict(found.values())


def norms_of(slots: list[Slot]) -> Iterator[tuple[nn.Module, str]]:
    """Each batch norm once, frozen ones of any library included, with the paths of all its slots."""
    paths: dict[int, list[str]] = {}
    for slot in slots:
        paths.setdefault(id(slot.module), []).append(slot.path or "the model")
    for module in {id(slot.module): slot.module for slot in slots}.values():
        if isinstance(module, _BatchNorm) or is_frozen_norm(module):
            yield module, ", ".join(paths[id(module)])


def layers_of(slots: list[Slot]) -> Iterator[tuple[_BatchNorm, str]]:
    """Each of torch's and our batch norms once, with the paths of all its slots."""
    for module, paths in norms_of(slots):
        if isinstance(module, _BatchNorm):
            yield module, paths


def sequential_pairs(slots: list[Slot]) -> Iterator[tuple[Slot, Slot]]:
    """Neighbors in a plain `nn.Sequential`: the output of the first goes only into the second."""
    for before, after in itertools.pairwise(slot for slot in slots if is_sequential(slot.parent)):
        if before.parent is after.parent:
            yield before, after


def is_sequential(parent: nn.Module | None) -> bool:
    """Whether a module only calls its children one after the other."""
    return (
        isinstance(parent, nn.Sequential)
        and type(parent).forward is nn.Sequential.forward
        and "forward" not in parent.__dict__
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks, or a forward that is an attribute of the object."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    lazy = isinstance(module, LazyModuleMixin)  # its own pre-hook is removed at the first input
    return "forward" in module.__dict__ or (any(hooks) and not (lazy and sum(map(len, hooks)) == 1))


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module looks like a frozen batch norm of another library: four buffers of one size, and no parameters."""
    buffers = module._buffers
    return (
        not isinstance(module, _BatchNorm)
        and not module._parameters
        and not any(True for child in module.children() for _ in child.parameters())
        and set(buffers) - {"num_batches_tracked"} == set(_AFFINE)
        and len({None if value is None else value.shape for value in (buffers[name] for name in _AFFINE)}) == 1
        and buffers["weight"] is not None
        and buffers["weight"].dim() == 1
    )
