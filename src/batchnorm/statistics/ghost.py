"""Virtual batches."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.functional import is_single_value, normalize
from batchnorm.functional.autograd import differentiated_by_torch
from batchnorm.moments import Moments
from batchnorm.statistics.contract import Layer
from batchnorm.statistics.shared import by_batch, reducer_of, train_or_infer


@dataclass(frozen=True)
class Ghost:
    """Ghost batch normalization (Hoffer, Hubara & Soudry 2017, arXiv:1705.08741, Algorithm 1): virtual batches of `size` samples.

    Each group of `size` consecutive samples is normalized by its own statistics: the noise of small batches, which regularizes,
    at the speed of large ones. The samples left over are a group too; one alone that has no variance joins the group before it.
    The running statistics move once, by the pooled moments of all groups, which are those of the whole batch: they are what `Batch`
    would have. (The paper moves them group by group; that weighs the last groups most, and follows the variance within groups.)

    Args:
        size: samples in a group.

    Raises:
        InputError: if size is less than 1; in training if a group has one value per channel and `on_single` is "error".
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size must be at least 1, the samples in a group, but got {self.size}")

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        return train_or_infer(layer, x, residual, mask, self._by_replicas, self.size)

    def _by_replicas(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Moments]:
        """Groups are a replica's own; only what moves the running statistics is merged."""
        y, pooled = self._by_group(layer, x, residual, mask)
        reducer = reducer_of(layer)
        if reducer is None or layer.running_mean is None:
            return y, pooled
        if is_single_value(x[: self.size]):  # which teach nothing; but the others wait for this replica's
            pooled = Moments(0, torch.zeros_like(pooled.mean), torch.zeros_like(pooled.m2))
        return y, reducer.merge(pooled.detach())

    def _by_group(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Moments]:
        N = x.shape[0]
        groups, left = divmod(N, self.size)
        if groups and left and is_single_value(x[N - left :]):
            groups, left = groups - 1, left + self.size
        if groups + (left > 0) <= 1:
            return by_batch(layer, x, residual, mask)
        layout = _channels_last(x)
        if layout is not None:
            x = _WithGradient.apply(x, layout)
        along_batch = None if mask is None else mask.expand(N, *x.shape[2:])
        cut = N - left
        pieces = [_by_equal_groups(layer, x[:cut], _cut(residual, 0, cut), _cut(along_batch, 0, cut), groups)]
        if left:
            pieces.append(by_batch(layer, x[cut:], _cut(residual, cut, N), _cut(along_batch, cut, N)))
        y = torch.cat([y for y, _ in pieces]) if left else pieces[0][0]
        pooled = functools.reduce(Moments.merge, (moments for _, moments in pieces))
        return y if layout is None else y.contiguous(memory_format=layout), pooled


def _by_equal_groups(
    layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, groups: int
) -> tuple[Tensor, Moments]:
    """Each of so many groups by its own statistics, as channels of their own; and their pooled moments."""
    if mask is not None:  # differs from group to group, and so from channel to channel
        parts = [
            by_batch(layer, *(None if value is None else value.chunk(groups)[i] for value in (x, residual, mask)))  # pyright: ignore
            for i in range(groups)
        ]
        return torch.cat([y for y, _ in parts]), functools.reduce(Moments.merge, (moments for _, moments in parts))
    C = x.shape[1]
    gamma, beta = (None if value is None else value.repeat(groups) for value in (layer.gamma, layer.beta))
    folded = None if residual is None else _groups_as_channels(residual, groups)
    y, moments = normalize(
        _groups_as_channels(x, groups), gamma, beta, layer.eps, activation=layer.activation, residual=folded
    )
    y = y.unflatten(1, (groups, C)).transpose(0, 1).flatten(0, 1)  # (N, C, *S)
    return y, Moments(moments.count, moments.mean.view(groups, C), moments.m2.view(groups, C)).pool()


class _WithGradient(torch.autograd.Function):
    """x, whose gradient has its memory format: groups that are taken apart and put together would leave another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].contiguous(memory_format=ctx.layout), None


def _channels_last(x: Tensor) -> torch.memory_format | None:
    if not differentiated_by_torch() and not x.is_contiguous():
        for layout, rank in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if x.dim() == rank and x.is_contiguous(memory_format=layout):
                return layout
    return None


def _groups_as_channels(x: Tensor, groups: int) -> Tensor:
    """(G · n, C, *S) as (n, G · C, *S)."""
    return x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _cut(value: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if value is None else value[start:stop]
