"""Virtual batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.functional import is_single_value
from batchnorm.moments import Moments
from batchnorm.statistics.common import by_batch, reducer_of, train_or_infer
from batchnorm.statistics.contract import Layer


@dataclass(frozen=True)
class Ghost:
    """Ghost batch normalization (Hoffer, Hubara & Soudry 2017, arXiv:1705.08741, Algorithm 1): virtual batches of `size` samples.

    Each group of `size` consecutive samples is normalized by its own statistics. This gives the regularizing noise of small batches at
    the speed of large ones. The remaining samples form a group too; a single one without variance joins the group before it. The
    running statistics are updated once, by the pooled moments of all groups, so they are the same as with `Batch`. (The paper updates
    them group by group, which weighs the last groups most and tracks the variance within groups.)

    Args:
        size: samples per group.

    Raises:
        InputError: if size is less than 1; in training, if a group has one value per channel and `on_single` is "error".
    """

    infers_by_running_statistics: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = True

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size must be at least 1, the number of samples per group, but got {self.size}")

    def __call__(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None = None
    ) -> Tensor:
        return train_or_infer(layer, x, residual, mask, self._by_replicas, self.size, weights=weights)

    def _by_replicas(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Moments]:
        """Normalize the groups of this replica; replicas merge only the moments that update the running statistics."""
        y, pooled = by_batch(layer, x, residual, mask, weights, group_size=self.size)
        reducer = reducer_of(layer)
        if reducer is None or layer.running_mean is None:
            return y, pooled
        if is_single_value(
            x[: self.size]
        ):  # without variance they count for nothing, but the other replicas wait for this one
            pooled = Moments(0, torch.zeros_like(pooled.mean), torch.zeros_like(pooled.m2))
        return y, reducer.merge(pooled.detach())
