"""One walker for all surgery: every place of a model where a module hangs, shared modules and cycles included."""

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
    """One place of a model where a module hangs. A module shared by two parents has two slots.

    Attributes:
        path: its name in the model, "" for the root.
        parent: the module it hangs on; None for the root.
        name: its name there.
        module: what hangs there.
    """

    path: str
    parent: nn.Module | None
    name: str
    module: nn.Module

    def hang(self, module: nn.Module) -> None:
        """Hang another module in this place, which is not the root."""
        assert self.parent is not None
        self.parent._modules[self.name] = module


def walk(model: nn.Module) -> Iterator[Slot]:
    """Every slot of a model, parents first, each parent once: shared modules appear in every slot, cycles end."""
    seen: set[int] = set()

    def visit(slot: Slot) -> Iterator[Slot]:
        yield slot
        if id(slot.module) in seen:
            return
        seen.add(id(slot.module))
        for name, child in slot.module._modules.items():  # named_children leaves out a second slot of the same child
            if child is not None:
                yield from visit(Slot(f"{slot.path}.{name}" if slot.path else name, slot.module, name, child))

    yield from visit(Slot("", None, "", model))


def slots_of(model: nn.Module) -> list[Slot]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    return list(walk(model))


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Each batch norm of a model, torch's and ours, once, by the first of its names; "the model" if it is that itself.

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
    """Neighbours in a plain `nn.Sequential`: the output of the first is the input of the second, and goes nowhere else."""
    for before, after in itertools.pairwise(slot for slot in slots if is_sequential(slot.parent)):
        if before.parent is after.parent:
            yield before, after


def is_sequential(parent: nn.Module | None) -> bool:
    """Whether a module calls its children one after the other, and does nothing else."""
    return (
        isinstance(parent, nn.Sequential)
        and type(parent).forward is nn.Sequential.forward
        and "forward" not in parent.__dict__
    )


def is_watched(module: nn.Module) -> bool:
    """Whether hooks, or a forward of this very object, stand between it and its neighbor."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    lazy = isinstance(module, LazyModuleMixin)  # whose own pre-hook goes away with its first input
    return "forward" in module.__dict__ or (any(hooks) and not (lazy and sum(map(len, hooks)) == 1))


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a frozen batch norm as other libraries have it: four buffers of one size, and no parameters."""
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
