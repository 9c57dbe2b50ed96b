"""Nested tensors of jagged layout: the positions of all samples form one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError, InputError, ShapeError


def normalize_nested(
    normalize: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor],
    input: Tensor,
    residual: Tensor | None,
    weights: Tensor | None,
    channel_axis: int,
) -> Tensor:
    """Normalize a nested tensor as one batch (M, C, *rest) of its positions.

    Args:
        normalize: takes x, the residual, a mask (M, *rest) or None and weights (M,) or None, and returns y, of x's shape.
        input: nested, of jagged layout.
        residual: nested, with the same offsets, or None.
        weights: of the samples, (N,), or None.
        channel_axis: counted from the front of the nested shape.

    Raises:
        ArgumentError: on another layout.
        InputError: if the channel axis is the ragged one.
        ShapeError: if the residual has other offsets, or the weights are not (N,).
    """
    if input.layout != torch.jagged:
        raise ArgumentError(
            f"a nested input must have the layout torch.jagged, but has {input.layout}; build it with "
            "torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    jagged: Any = input
    axis, ragged = channel_axis - 1, jagged._ragged_idx - 1  # of the values, which have no batch axis
    if axis == ragged:
        raise InputError(
            f"the channel axis must have the same size in all samples, but axis {axis + 1} of {input.shape} is ragged; set channel_axis"
        )

    def as_batch(nested: Tensor) -> Tensor:
        return nested.values().movedim((ragged, axis), (0, 1))

    if residual is not None:
        if not residual.is_nested or residual.shape != input.shape:  # the ragged size stands for the offsets
            raise ShapeError(
                "the residual of a nested input must be nested, with the same offsets, but it is not; build it from the input's offsets"
            )
        residual = as_batch(residual)
    x, offsets, held = as_batch(input), jagged.offsets(), jagged.lengths()  # (M, C, *rest)
    between = None if held is None else _within(offsets, held, x.shape[0]).view(-1, *[1] * (x.dim() - 2))
    if weights is not None:
        if not isinstance(weights, Tensor) or weights.shape != input.shape[:1]:
            raise ShapeError(
                f"the weights of a nested input must be a tensor (N,) = ({input.shape[0]},), one for each sample, but "
                f"{getattr(weights, 'shape', weights)!r} came"
            )
        weights = weights[_sample_of_each(offsets, x.shape[0])]
    y = normalize(x, residual, between, weights).movedim((0, 1), (ragged, axis))
    return torch.nested.nested_tensor_from_jagged(y, offsets, held, jagged_dim=ragged + 1)


def _sample_of_each(offsets: Tensor, positions: int) -> Tensor:
    """The sample to which each position belongs, or which ends before it, (M,); the first for what lies before all."""
    each = torch.arange(positions, dtype=offsets.dtype, device=offsets.device)
    return (torch.searchsorted(offsets[:-1], each, right=True) - 1).clamp(min=0)


def _within(offsets: Tensor, lengths: Tensor, positions: int) -> Tensor:
    """A mask of the positions that belong to a sample, (M,) bool, for a nested tensor with gaps between its samples."""
    steps = torch.zeros(positions + 1, dtype=offsets.dtype, device=offsets.device)
    ones = torch.ones_like(lengths, dtype=offsets.dtype)
    starts = offsets[:-1]  # (N,)
    return steps.index_add(0, starts, ones).index_add(0, starts + lengths, -ones)[:-1].cumsum(0) > 0
