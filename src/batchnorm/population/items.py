"""Calls a model with the items of a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from batchnorm.errors import ArgumentError

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, item: Any) -> Any:
    """Call a model with a loader's item: a tensor, a mapping of keyword arguments, or a tuple or list whose first element is either.

    Tensors are moved to the device of the model's first parameter or buffer. If the model is a data-parallel wrapper, the module inside
    is called, since the wrapper would exchange buffers in every forward, or call copies of the layers.

    Raises:
        ArgumentError: on anything else.
    """
    inside = model.module if isinstance(model, (DistributedDataParallel, nn.DataParallel)) else model
    given = item[0] if isinstance(item, (tuple, list)) and len(item) else item
    device = next((value.device for value in (*inside.parameters(), *inside.buffers())), None)

    def to_device(values: Any) -> Any:
        return values if device is None else tree_map_only(Tensor, lambda value: value.to(device), values)

    if isinstance(given, Tensor):
        return inside(to_device(given))
    if isinstance(given, Mapping):  # any mapping, not only the types that torch knows
        return inside(**to_device(dict(given)))
    raise ArgumentError(
        "an item of the loader must be a tensor, a dict of keyword arguments, or a tuple or list that starts with one, but got "
        f"{type(item).__name__}{'' if given is item else f' of {type(given).__name__}'}; pass forward=, a function that calls "
        "the model with such an item"
    )


def check_loader(loader: Any, *, several_passes: bool) -> None:
    """Check that a loader can be iterated, and more than once if several passes are needed.

    Raises:
        ArgumentError: if it cannot.
    """
    if isinstance(loader, (Tensor, str, bytes, Mapping)) or not (
        isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    ):
        raise ArgumentError(
            f"loader must yield batches, such as a DataLoader or a list, but got {type(loader).__name__}"
        )
    if several_passes and isinstance(loader, Iterator):
        raise ArgumentError(
            'method="layerwise" reads the loader several times, but an iterator '
            f'({type(loader).__name__}) can be read only once; pass a DataLoader or a list, or method="joint"'
        )
