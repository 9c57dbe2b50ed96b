"""Tracks from which layers a tensor was computed: every operator copies the marks of its inputs to its outputs.

Mechanism and limitations: a `TorchDispatchMode` sees each operator, under `no_grad` and behind `detach` too. Marks belong to storages,
so views and in-place operations keep them. Values that leave torch (`.item()`, NumPy) lose them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Lineage(TorchDispatchMode):
    """A mode in which operators propagate marks, the bits of an int. It holds no tensor alive."""

    def __init__(self) -> None:
        super().__init__()
        # A weak reference lets the storage's memory be freed, but prevents the reuse of its address.
        self._marks: dict[int, tuple[StorageWeakRef, int]] = {}

    def clear(self) -> None:
        """Remove all marks."""
        self._marks.clear()

    def of(self, values: Any) -> int:
        """The marks of all tensors in a nest of tuples, lists and dicts."""
        marks = 0
        for value in tree_leaves(values):
            key = _storage(value)
            if key is not None and key in self._marks:
                marks |= self._marks[key][1]
        return marks

    def mark(self, values: Any, marks: int) -> None:
        """Add marks to all tensors in a nest of tuples, lists and dicts."""
        for value in tree_leaves(values):
            key = _storage(value)
            if key is not None:
                before = self._marks.get(key)
                reference = StorageWeakRef(value.untyped_storage()) if before is None else before[0]
                self._marks[key] = (reference, marks if before is None else marks | before[1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if types:  # a tensor subclass: its inner tensors arrive here afterwards
            return NotImplemented
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        marks = self.of((args, kwargs))
        if marks:
            self.mark(output, marks)
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = args[position] if position < len(args) else kwargs.get(argument.name)
                    self.mark(written, marks)
        return output


def _storage(value: Any) -> int | None:
    if not isinstance(value, Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return None
