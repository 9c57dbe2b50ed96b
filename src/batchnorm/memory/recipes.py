"""What stands in for a saved tensor: the tensor itself with the version it had, or how to compute it again."""

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
    """Where a tensor lies in its storage."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Kept:
    """A tensor that stays as it is, and the version it had: where torch's own check does not reach."""

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
    """How to compute a tensor again: a function and its inputs, which are kept or have a recipe themselves.

    Attributes:
        depth: steps to what is kept.
        references: those that stand in for the tensor in somebody's backward.
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
        """The tensor, computed again unless it still lies here; it stays for the references that have not asked yet.

        Raises:
            StateError: if something it is computed from was modified in place.
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
                queue_callback(functools.partial(_forget, weakref.ref(self)))
            return result

    def _compute(self) -> Tensor:
        result = self._function(*(None if given is None else given.value() for given in self._inputs))
        if result.stride() == self._stride:
            return result
        # In place the strides were those of the first input; out of place torch chooses.
        return result.new_empty_strided(result.shape, self._stride).copy_(result)

    def forget(self) -> None:
        """Free the result, whoever may still ask for it."""
        with self._lock:
            self._result = None


def _forget(recipe: weakref.ref[Recipe]) -> None:
    found = recipe()
    if found is not None:
        found.forget()


class Reference:
    """A tensor by where it comes from, and its place there: what autograd keeps in the tensor's stead.

    Attributes:
        source: what holds the values, or tells how to compute them.
        place: size, strides and offset of a view into the source; None for the whole of it.
    """

    __slots__ = ("__weakref__", "place", "source")

    def __init__(self, source: Kept | Recipe, place: Place | None) -> None:
        self.source, self.place = source, place

    def stand_in(self, other: Reference) -> None:
        """Refer to what the other, a reference to a recipe, refers to."""
        self.source, self.place = other.source, other.place
        if isinstance(self.source, Recipe):
            self.source.references.add(self)

    def value(self) -> Tensor:
        """The tensor, as an input of a recipe."""
        return self._seen(self.source.value())

    def open(self) -> Tensor:
        """The tensor, for the backward that saved it.

        Raises:
            StateError: if something it needs was modified in place.
        """
        if isinstance(self.source, Kept):
            return self.source.value()
        with _as_in_forward():
            return self._seen(self.source.value(self))

    def _seen(self, tensor: Tensor) -> Tensor:
        return tensor if self.place is None else tensor.as_strided(*self.place)


@contextmanager
def _as_in_forward() -> Iterator[None]:
    """The circumstances of a recipe, whatever those of the backward are."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if transforms_active():  # a batch of gradients: the recipe's tensors are not batched
            stack.enter_context(outside_transforms())
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
