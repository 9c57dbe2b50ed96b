"""What a loader yields, and how the model is called with it."""

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

    Tensors go to the device of the model's first parameter or buffer. Of data-parallel wrappers the module inside is called: they
    would exchange buffers in every forward, or call copies of the layers.

    Raises:
        ArgumentError: on anything else.
    """
    inside = model.module if isinstance(model, (DistributedDataParallel, nn.DataParallel)) else model
    given = item[0] if isinstance(item, (tuple, list)) and len(item) else item
    device = next((value.device for value in (*inside.parameters(), *inside.buffers())), None)

    def moved(values: Any) -> Any:
        return values if device is None else tree_map_only(Tensor, lambda value: value.to(device), values)

    if isinstance(given, Tensor):
        return inside(moved(given))
    if isinstance(given, Mapping):  # of any kind, not only those that torch takes apart
        return inside(**moved(dict(given)))
    raise ArgumentError(
        "an item of the loader must be a tensor, a dict of keyword arguments, or a tuple or list that starts with one, but got "
        f"{type(item).__name__}{'' if given is item else f' of {type(given).__name__}'}; pass forward=, a function that calls "
        "the model with such an item"
    )


def check_loader(loader: Any, *, several_passes: bool) -> None:
    """Refuse what cannot be iterated, or only once where several passes are needed.

    Raises:
        ArgumentError: saying what to pass.
    """
    if isinstance(loader, (Tensor, str, bytes, Mapping)) or not (
        isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    ):
        raise ArgumentError(
            f"loader must yield batches, such as a DataLoader or a list, but got {type(loader).__name__}"
        )
    if several_passes and isinstance(loader, Iterator):
        raise ArgumentError(
            'method="layerwise" reads the loader once for each depth, but an iterator '
            f'({type(loader).__name__}) can be read only once; pass a DataLoader or a list, or method="joint"'
        )
