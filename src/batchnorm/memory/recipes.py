"""Replacements for saved tensors: the tensor itself with its version, or a recipe to compute it again."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import StateError
from batchnorm.torch_state import graph_task, outside_transforms, queue_callback, transforms_active


class Place(NamedTuple):
    """Size, strides and offset of a tensor in its storage."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class SavedTensor:
    """A saved tensor and its version, to detect in-place changes that torch does not check."""

    __slots__ = ("__weakref__", "tensor", "version")
    depth = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version  # an alias outside the graph: no cycle

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            StateError: if it was modified in place since.
        """
        if self.tensor._version != self.version:
            raise StateError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.tensor.shape)}] is at version {self.tensor._version}; expected version "
                f"{self.version} instead. Under batchnorm.save_memory a batch norm's input is needed for its output too; "
                "modify a clone"
            )
        return self.tensor


class Recipe:
    """How to compute a tensor again: a function, and inputs that are saved or have a recipe themselves.

    Attributes:
        depth: number of steps from saved tensors.
        references: the references that backwards hold in place of the tensor.
    """

    __slots__ = (
        "__weakref__",
        "_function",
        "_inputs",
        "_lock",
        "_result",
        "_stride",
        "_waiting",
        "depth",
        "references",
    )

    def __init__(
        self, function: Callable[..., Tensor], inputs: tuple[Reference | None, ...], stride: tuple[int, ...]
    ) -> None:
        self._function, self._inputs, self._stride = function, inputs, stride
        self.depth = 1 + max(reference.source.depth for reference in inputs if reference is not None)
        self.references: weakref.WeakSet[Reference] = weakref.WeakSet()
        self._waiting: weakref.WeakSet[Reference] = weakref.WeakSet()
        self._result: Tensor | None = None
        self._lock = threading.RLock()

    def value(self, reference: Reference | None = None) -> Tensor:
        """Compute the tensor, or return the result if it is still held for references that were not opened yet.

        Raises:
            StateError: if a tensor that it is computed from was modified in place.
        """
        with self._lock:
            result = self._result
            if result is None:
                result = self._compute()
                self._waiting = weakref.WeakSet(self.references)
            if reference is not None:
                self._waiting.discard(reference)
            if not self._waiting:
                self._result = None
            elif self._result is None and graph_task() != -1:  # during a backward, which has an end
                self._result = result
                queue_callback(functools.partial(_free, weakref.ref(self)))
            return result

    def _compute(self) -> Tensor:
        result = self._function(*(None if given is None else given.value() for given in self._inputs))
        if result.stride() == self._stride:
            return result
        # An in-place function keeps the strides of its first input; out of place, torch chooses them.
        return result.new_empty_strided(result.shape, self._stride).copy_(result)

    def free(self) -> None:
        """Free the result, even if references were not opened yet."""
        with self._lock:
            self._result = None


def _free(recipe: weakref.ref[Recipe]) -> None:
    found = recipe()
    if found is not None:
        found.free()


class Reference:
    """A tensor as a source and a place in it; autograd saves it in place of the tensor.

    Attributes:
        source: a saved tensor or a recipe.
        place: size, strides and offset of a view into the source; None for all of it.
    """

    __slots__ = ("__weakref__", "place", "source")

    def __init__(self, source: SavedTensor | Recipe, place: Place | None) -> None:
        self.source, self.place = source, place

    def redirect(self, other: Reference) -> None:
        """Refer to the same recipe and place as the other reference."""
        self.source, self.place = other.source, other.place
        if isinstance(self.source, Recipe):
            self.source.references.add(self)

    def value(self) -> Tensor:
        """The tensor, as an input of a recipe."""
        return self._view(self.source.value())

    def open(self) -> Tensor:
        """The tensor, for the backward that saved it.

        Raises:
            StateError: if a tensor that it needs was modified in place.
        """
        if isinstance(self.source, SavedTensor):
            return self.source.value()
        with _as_in_forward():
            return self._view(self.source.value(self))

    def _view(self, tensor: Tensor) -> Tensor:
        return tensor if self.place is None else tensor.as_strided(*self.place)


@contextmanager
def _as_in_forward() -> Iterator[None]:
    """Compute recipes without gradients, transforms and autocast, whatever the modes of the backward are."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if transforms_active():  # gradients are batched, the tensors of the recipe are not
            stack.enter_context(outside_transforms())
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
