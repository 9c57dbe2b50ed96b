"""Tracks the tensors of a thread that saves memory, and extends recipes by elementwise functions."""

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

from batchnorm.memory.recipes import Place, Recipe, Reference, SavedTensor

DEPTH = 16  # steps of a recipe from saved tensors; computing it temporarily holds one tensor for each block in between

_ADD = (torch.add, Tensor.add, Tensor.add_)
_RELU = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
# Elementwise functions of one tensor, mapped to the out-of-place function; those with a parameter `inplace`, to its position.
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
        recipe: how to compute them.
        version: the version of the tensor for which the recipe is valid.
        dtype, place: dtype and place of the tensor that the recipe computes.
        alive: a weak reference to that tensor; when it dies, the entry is removed.
        storage: a weak reference that prevents another storage from getting the same address.
    """

    recipe: Recipe
    version: int
    dtype: torch.dtype
    place: Place
    alive: weakref.ref[Tensor]
    storage: StorageWeakRef


class Saver:
    """The recipes of one thread while it saves memory.

    Attributes:
        everywhere: how many open contexts are those of `save_memory`, for all layers, rather than of a model.
        wanted: whether to save memory for the current layer.
        recording: whether a call with saved-tensor hooks is running.
    """

    def __init__(self) -> None:
        self.everywhere, self.wanted, self.recording = 0, True, False
        self._entries: dict[int, _Entry] = {}  # by storage
        self._saved: weakref.WeakValueDictionary[int, SavedTensor] = weakref.WeakValueDictionary()  # by storage
        self._packed: list[tuple[int, Reference]] = []  # in the current call, of storages without a recipe

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function; tensors that it saves are replaced by their recipes, if they have one."""
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
                if isinstance(reference.source, SavedTensor):
                    self._saved[key] = reference.source
            self.recording, self._packed = False, []

    def record(
        self,
        output: Tensor,
        function: Callable[..., Tensor],
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Register a recipe for a batch norm's output, a function of x and mask, which are saved anyway, and of the residual.

        If the residual would be saved only for the recipe, nothing is registered, since that would use as much memory as it saves.
        """
        if not self.wanted or any(is_foreign(value) for value in (output, x, residual, mask) if value is not None):
            return
        free = None if residual is None else self._free(residual)
        if residual is not None and free is None:
            return
        saved = (
            None if value is None else self._free(value) or Reference(SavedTensor(value), None) for value in (x, mask)
        )
        self._register(output, function, (next(saved), free, next(saved)))

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()

    def _pack(self, tensor: Tensor) -> Reference:
        if is_foreign(tensor):
            return Reference(SavedTensor(tensor), None)
        key, entry = _key(tensor), self._entry(tensor)
        reference = Reference(SavedTensor(tensor), None) if entry is None else _reference_to(entry, tensor)
        if isinstance(reference.source, SavedTensor):
            self._packed.append((key, reference))
        else:
            reference.source.references.add(reference)
        return reference

    def _entry(self, tensor: Tensor) -> _Entry | None:
        """The entry of the tensor's storage, if the recipe is still valid."""
        entry = self._entries.get(_key(tensor))
        known = entry is not None and entry.version == tensor._version and entry.dtype is tensor.dtype
        return entry if known and not tensor.is_neg() else None

    def _free(self, tensor: Tensor) -> Reference | None:
        """A reference to a tensor that has a recipe or is saved anyway; None if it would cost memory."""
        entry = self._entry(tensor)
        if entry is not None:
            return _reference_to(entry, tensor)
        saved = self._saved.get(_key(tensor))
        return None if saved is None or saved.version != tensor._version else Reference(SavedTensor(tensor), None)

    def _step(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Tensor], tuple[Reference, ...]] | None:
        """The out-of-place version of a call and its inputs, if they have recipes; else None."""
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
        """Register the recipe of a result, and redirect references to it that the call itself saved."""
        key = _key(result)
        before = self._entries.get(key)
        if before is not None and before.place != _place(result):  # only a view of it was modified in place
            return
        self._register(result, function, inputs)
        entry = self._entry(result)
        if entry is None:
            return
        for packed, reference in self._packed:
            if (
                packed == key
                and isinstance(reference.source, SavedTensor)
                and reference.source.version == entry.version
            ):
                reference.redirect(_reference_to(entry, reference.source.tensor))

    def _register(self, tensor: Tensor, function: Callable[..., Tensor], inputs: tuple[Reference | None, ...]) -> None:
        key, place = _key(tensor), _place(tensor)
        recipe = Recipe(function, inputs, place.stride)
        self._entries.pop(key, None)
        if recipe.depth > DEPTH or place.offset:  # not registered, so it is saved, and later recipes start from it
            return
        alive = weakref.ref(tensor, lambda _: self._entries.pop(key, None))
        storage = StorageWeakRef(tensor.untyped_storage())
        self._entries[key] = _Entry(recipe, tensor._version, tensor.dtype, place, alive, storage)


def _with(function: Callable[..., Tensor], rest: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Tensor]:
    return (lambda value: function(value, *rest, **options)) if rest or options else function


def is_foreign(value: Any) -> bool:
    """Whether a value is not a plain strided tensor."""
    return type(value) not in (Tensor, Parameter) or value.layout is not torch.strided


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> Place:
    return Place(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _reference_to(entry: _Entry, tensor: Tensor) -> Reference:
    """A reference for a tensor in the entry's storage to its recipe."""
    place = _place(tensor)
    return Reference(entry.recipe, None if place == entry.place else place)
