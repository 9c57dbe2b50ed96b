"""Tensors that the programs write: results in the layout of x, channel values, and what lies between two launches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor


class _Poison(threading.local):
    active = False


_poison = _Poison()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill new tensors with NaN (integers with -1), so that a value which no program writes is found."""
    _poison.active, before = True, _poison.active
    try:
        yield
    finally:
        _poison.active = before


def empty(x: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor beside x."""
    return _filled(torch.empty(shape, dtype=dtype, device=x.device))


def like(x: Tensor) -> Tensor:
    """A tensor of x's shape, dtype and strides."""
    return _filled(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device))


def laid_out_as(x: Tensor, value: Tensor) -> Tensor:
    """The values in x's dtype and strides; a copy only where they differ."""
    if value.dtype is x.dtype and value.stride() == x.stride():
        return value
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(value)


def flat(values: Tensor | None) -> Tensor | None:
    """Channel values without gaps."""
    return values if values is None or values.is_contiguous() else values.contiguous()


def whole_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask as bytes, (N, 1, *S) without gaps."""
    return None if mask is None else mask.expand(x.shape[0], 1, *x.shape[2:]).contiguous().view(torch.uint8)


def _filled(value: Tensor) -> Tensor:
    if _poison.active:
        value.fill_(torch.nan if value.is_floating_point() else -1)
    return value
