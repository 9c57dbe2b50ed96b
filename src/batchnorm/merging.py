"""Merges the buffers of a layer over replicas, with a rule for each kind of buffer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.statistics import SourceBuffer, buffers_of

_COUNTER = "num_batches_tracked"


def source_buffers(layer: _BatchNorm) -> dict[str, SourceBuffer]:
    """The buffers that the statistics source of a layer adds; none for torch's layers."""
    statistics = getattr(layer, "statistics", None)
    return {} if statistics is None else buffers_of(statistics)


def merged(layer: _BatchNorm, tables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The merged buffers, (*shape) float64 each. Values that are the same on all replicas do not change.

    Args:
        layer: the layer that has these buffers.
        tables: for each buffer, the values of all W replicas, (W, *shape) float64.
    """
    rules = _Rules(layer, tables)
    return {name: rules.merged(name) for name in tables}


class _Rules:
    def __init__(self, layer: _BatchNorm, tables: dict[str, Tensor]) -> None:
        self._momentum, self._added, self._tables = layer.momentum, source_buffers(layer), tables

    def merged(self, name: str) -> Tensor:
        table = self._tables[name]
        if name == "num_nonfinite_batches" or self._root(name) == _COUNTER:
            return table.amax(0)
        shares, means = self._shares(name), self._means_of(name)
        if _all_equal(table) and (means is None or _all_equal(means)):  # no rounding error, however often it is called
            return table[0]
        value = _average(shares, table)
        if means is not None:
            value = value + _average(shares, (means - _average(shares, means)).square())
        return value

    def _root(self, name: str) -> str:
        """The buffer of every layer whose values this one starts with."""
        while name in self._added:
            name = self._added[name].like
        return name

    def _is_blank(self, name: str) -> bool:
        return name in self._added and self._added[name].blank

    def _means_of(self, name: str) -> Tensor | None:
        """The means that belong to a variance; None for other buffers."""
        if self._root(name) != "running_var" or self._is_blank(name):
            return None
        return self._tables.get(name.replace("running_var", "running_mean", 1))

    def _counts(self, name: str) -> Tensor | None:
        """Number of batches that updated a buffer, (W,); None if they are not counted."""
        own = _COUNTER + name.removeprefix(self._root(name))
        if own in self._tables:
            return self._tables[own]
        return self._counts(self._added[name].like) if name in self._added else None

    def _shares(self, name: str) -> Tensor:
        """The weight of each replica, broadcastable to (W, *shape)."""
        table, rows = self._tables[name], self._added[name].rows if name in self._added else None
        if rows is None:
            weights = self._of_moving_average(name, table)
        elif self._is_blank(name):
            weights = self._had_gradients(name)
        else:
            weights = self._written(name, table, rows)
        weights = weights.reshape(*weights.shape, *[1] * (table.dim() - weights.dim()))
        total = weights.sum(0)
        return torch.where(total > 0, weights / total, 1 / table.shape[0])

    def _of_moving_average(self, name: str, table: Tensor) -> Tensor:
        """(W,): the share of data in a moving average; equal if the batches are not counted."""
        counts = self._counts(name)
        if counts is None:
            return table.new_ones(table.shape[0])
        return counts if self._momentum is None else 1 - (1 - self._momentum) ** counts

    def _written(self, name: str, table: Tensor, rows: int) -> Tensor:
        """(W, rows): which rows of a window have been written."""
        counts = self._counts(name)
        if counts is None:
            return table.new_ones(table.shape[0], rows)
        return (counts.unsqueeze(1) > torch.arange(rows, device=table.device)).double()

    def _had_gradients(self, name: str) -> Tensor:
        """(W, rows): which rows are not zero in any of the windows that are written together."""
        mine = self._added[name]
        together = [table for other, table in self._tables.items() if self._added.get(other) == mine]
        return torch.stack([(table != 0).flatten(2).any(2) for table in together]).any(0).double()


def _average(shares: Tensor, table: Tensor) -> Tensor:
    """Weighted average over W, in the order of the ranks; values of weight 0 may be NaN. A second sum corrects the rounding."""
    mean = torch.where(shares > 0, shares * table, 0.0).sum(0)
    return mean + torch.where(shares > 0, shares * (table - mean), 0.0).sum(0)


def _all_equal(table: Tensor) -> bool:
    return bool(((table == table[0]) | (table.isnan() & table[0].isnan())).all())
