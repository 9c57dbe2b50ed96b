"""What a thread knows of its tensors while it saves memory, and which functions extend a recipe."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from batchnorm.memory.recipes import Kept, Place, Recipe, Reference

DEPTH = 16  # steps from what is kept to what is computed again; one tensor for each block passed lies in between for a while

_ADD = (torch.add, Tensor.add, Tensor.add_)
_RELU = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
# Elementwise functions of one tensor, by the function that computes the same out of place; `inplace` is their last parameter or none.
ELEMENTWISE: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(_RELU, torch.relu),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid), torch.sigmoid),
    **dict.fromkeys((torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, F.tanh), torch.tanh),
    F.gelu: F.gelu,
}
_WITH_INPLACE = {F.relu: 1, F.relu6: 1, F.silu: 1, F.mish: 1, F.hardswish: 1, F.hardsigmoid: 1, F.leaky_relu: 2,
                 F.elu: 2, F.celu: 2, F.selu: 1, F.hardtanh: 3}  # fmt: skip


class _Entry(NamedTuple):
    """A storage whose values have a recipe.

    Attributes:
        recipe: for them.
        version: when they were those of the recipe.
        dtype, place: of the tensor the recipe computes.
        alive: while that tensor lives; its death ends the entry.
        storage: keeps the address from being given to another storage.
    """

    recipe: Recipe
    version: int
    dtype: torch.dtype
    place: Place
    alive: weakref.ref[Tensor]
    storage: StorageWeakRef


class Saver:
    """What one thread knows of its tensors while it saves memory.

    Attributes:
        everywhere: how many of the contexts that are open were opened by `save_memory`, for all layers, rather than by a model.
        wanted: whether the layer that is computed now takes part.
        recording: whether a call runs whose tensors are looked at.
    """

    def __init__(self) -> None:
        self.everywhere, self.wanted, self.recording = 0, True, False
        self._entries: dict[int, _Entry] = {}  # by storage
        self._kept: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()  # by storage
        self._packed: list[tuple[int, Reference]] = []  # in the call that runs, of storages without a recipe

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function; of what it saves the recipe is kept, where there is one."""
        step = self._step(function, args, kwargs)
        with self.hooks():
            result = function(*args, **kwargs)
            if step is not None and type(result) is Tensor and result.dtype is args[0].dtype:  # autocast may change it
                self._extend(result, *step)
        return result

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Saved-tensor hooks for one call."""
        self.recording, self._packed = True, []
        try:
            with saved_tensors_hooks(self._pack, Reference.open):
                yield
        finally:
            for key, reference in self._packed:
                if isinstance(reference.source, Kept):
                    self._kept[key] = reference.source
            self.recording, self._packed = False, []

    def remember(
        self,
        output: Tensor,
        function: Callable[..., Tensor],
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Give a batch norm's output a recipe: the function of x and mask, which are kept in any case, and of the residual.

        Nothing happens where the residual is in nobody else's keeping: the recipe would keep as much as it spares.
        """
        if not self.wanted or any(is_foreign(value) for value in (output, x, residual, mask) if value is not None):
            return
        free = None if residual is None else self._free(residual)
        if residual is not None and free is None:
            return
        kept = (None if value is None else self._free(value) or Reference(Kept(value), None) for value in (x, mask))
        self._register(output, function, (next(kept), free, next(kept)))

    def clear(self) -> None:
        """Forget all tensors."""
        self._entries.clear()

    def _pack(self, tensor: Tensor) -> Reference:
        if is_foreign(tensor):
            return Reference(Kept(tensor), None)
        key, entry = _key(tensor), self._entry(tensor)
        reference = Reference(Kept(tensor), None) if entry is None else _reference_to(entry, tensor)
        if isinstance(reference.source, Kept):
            self._packed.append((key, reference))
        else:
            reference.source.references.add(reference)
        return reference

    def _entry(self, tensor: Tensor) -> _Entry | None:
        """Of the tensor's storage, where it still holds what the recipe computes."""
        entry = self._entries.get(_key(tensor))
        known = entry is not None and entry.version == tensor._version and entry.dtype is tensor.dtype
        return entry if known and not tensor.is_neg() else None

    def _free(self, tensor: Tensor) -> Reference | None:
        """A reference to a tensor that costs no memory, since it has a recipe or is kept anyway; None where it would."""
        entry = self._entry(tensor)
        if entry is not None:
            return _reference_to(entry, tensor)
        kept = self._kept.get(_key(tensor))
        return None if kept is None or kept.version != tensor._version else Reference(Kept(tensor), None)

    def _step(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Tensor], tuple[Reference, ...]] | None:
        """A function that computes the same out of place, and its inputs, where the result shall have a recipe."""
        if not self._entries or not args or is_foreign(args[0]):
            return None
        if function in _ADD:
            plain = len(args) == 2 and not kwargs and not is_foreign(args[1])
            return self._addition(*args, inplace=function is Tensor.add_) if plain else None
        pure, inplace_at = ELEMENTWISE.get(function), _WITH_INPLACE.get(function)
        entry = None if pure is None and inplace_at is None else self._entry(args[0])
        if entry is None:
            return None
        rest = args[1:] if inplace_at is None else args[1:inplace_at]
        options = {name: value for name, value in kwargs.items() if name != "inplace"}
        if any(isinstance(value, Tensor) for value in (*rest, *options.values())):
            return None
        return _with(pure or function, rest, options), (_reference_to(entry, args[0]),)

    def _addition(
        self, one: Tensor, other: Tensor, inplace: bool
    ) -> tuple[Callable[..., Tensor], tuple[Reference, ...]] | None:
        if one.shape != other.shape or one.dtype is not other.dtype:
            return None
        if self._entry(one) is None and (inplace or self._entry(other) is None):
            return None
        first, second = self._free(one), self._free(other)
        return None if first is None or second is None else (torch.add, (first, second))

    def _extend(self, result: Tensor, function: Callable[..., Tensor], inputs: tuple[Reference, ...]) -> None:
        """Give a result its recipe, and what was packed of it on the way."""
        key = _key(result)
        before = self._entries.get(key)
        if before is not None and before.place != _place(result):  # a part of it was modified in place
            return
        self._register(result, function, inputs)
        entry = self._entry(result)
        if entry is None:
            return
        for packed, reference in self._packed:
            if packed == key and isinstance(reference.source, Kept) and reference.source.version == entry.version:
                reference.stand_in(_reference_to(entry, reference.source.tensor))

    def _register(self, tensor: Tensor, function: Callable[..., Tensor], inputs: tuple[Reference | None, ...]) -> None:
        key, place = _key(tensor), _place(tensor)
        recipe = Recipe(function, inputs, place.stride)
        self._entries.pop(key, None)
        if recipe.depth > DEPTH or place.offset:  # kept, then: the next recipes start from it
            return
        alive = weakref.ref(tensor, lambda _: self._entries.pop(key, None))
        storage = StorageWeakRef(tensor.untyped_storage())
        self._entries[key] = _Entry(recipe, tensor._version, tensor.dtype, place, alive, storage)


def _with(function: Callable[..., Tensor], rest: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Tensor]:
    return (lambda value: function(value, *rest, **options)) if rest or options else function


def is_foreign(value: Any) -> bool:
    """Whether it is no plain tensor in strided memory."""
    return type(value) not in (Tensor, Parameter) or value.layout is not torch.strided


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> Place:
    return Place(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _reference_to(entry: _Entry, tensor: Tensor) -> Reference:
    """A reference to the entry's recipe for a tensor in its storage."""
    place = _place(tensor)
    return Reference(entry.recipe, None if place == entry.place else place)
