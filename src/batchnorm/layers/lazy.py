"""Lazy layers: the number of channels comes with the first input, as in torch's `LazyBatchNorm2d`."""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
# (torch types its lazy mixin and its placeholders for its own use only)

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from batchnorm.layers.layer import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, check_tensor
from batchnorm.layers.state import STATISTICS
from batchnorm.statistics import buffers_of, parameters_of


class _LazyBatchNorm(LazyModuleMixin, BatchNorm):
    """A layer that learns its number of channels from its first input, then becomes `cls_to_become`."""

    cls_to_become: ClassVar[type[BatchNorm]]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        **options: Any,
    ) -> None:
        # Built without parameters and buffers, whose placeholders follow; the 1 stands for the unknown number of channels.
        super().__init__(1, eps, momentum, False, False, device, dtype, **options)
        self.num_features = 0
        self.affine, self.track_running_stats = affine, track_running_stats
        if affine:
            self.weight = UninitializedParameter(device=device, dtype=dtype)
            if bias:
                self.bias = UninitializedParameter(device=device, dtype=dtype)
        self._match_parameters_to_source(self.statistics, device, dtype)
        if track_running_stats:
            for name in STATISTICS:
                self.register_buffer(name, UninitializedBuffer(device=device, dtype=dtype))
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
            self._prepare_buffers()

    def reset_parameters(self) -> None:
        """Reset as `cls_to_become` does; does nothing before the number of channels is known."""
        if self.num_features and not self.has_uninitialized_params():
            super().reset_parameters()

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Set the number of channels by the first input, and create parameters and buffers of this size.

        Raises:
            InputError: if its rank is not the layer's.
        """
        if not self.has_uninitialized_params():
            return
        check_tensor(input)
        self._check_input_dim(input)
        self.num_features = input.shape[self._axis(input)]
        initial = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
        for name, start in initial.items():
            value = getattr(self, name)
            if isinstance(value, (UninitializedParameter, UninitializedBuffer)):  # others came from a checkpoint
                value.materialize((self.num_features,))
                with torch.no_grad():
                    value.fill_(start)
        for name, own in parameters_of(self.statistics).items():
            parameter = getattr(self, name, None)
            if own.like is not None and isinstance(parameter, UninitializedParameter):
                source = getattr(self, own.like)
                parameter.materialize(source.shape)
                with torch.no_grad():
                    parameter.copy_(own.start(source))
        for name, own in buffers_of(self.statistics).items():
            buffer, source = getattr(self, name), getattr(self, own.like)
            if isinstance(buffer, UninitializedBuffer):
                buffer.materialize((*(() if own.rows is None else (own.rows,)), *source.shape))
                with torch.no_grad():
                    buffer.copy_(own.start(source))
        self._widen_statistics({})


class LazyBatchNorm1d(_LazyBatchNorm, BatchNorm1d):
    """`BatchNorm1d` that learns num_features from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, BatchNorm2d):
    """`BatchNorm2d` that learns num_features from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, BatchNorm3d):
    """`BatchNorm3d` that learns num_features from its first input."""

    cls_to_become = BatchNorm3d
