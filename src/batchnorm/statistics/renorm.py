"""Batch statistics corrected toward the running statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from batchnorm.errors import InputError, StateError
from batchnorm.functional import moments, recomputing
from batchnorm.kernels import Renormalization
from batchnorm.moments import Moments
from batchnorm.statistics import recomputed
from batchnorm.statistics.common import by_batch, by_replicas, reducer_of, train_on_fast_path, train_or_infer
from batchnorm.statistics.contract import Layer
from batchnorm.statistics.recomputed import Buffers
from batchnorm.torch_state import unseen_by_checkpoints


@dataclass(frozen=True)
class Renorm:
    """Batch renormalization (Ioffe 2017, arXiv:1702.03275, Algorithm 1): for batches that are small or not a random sample.

        y = gamma · (x̂ · r + d) + beta
        r = clip(sigma / running sigma, 1 / r_max, r_max)      d = clip((mean - running mean) / running sigma, -d_max, d_max)

    where x̂ is normalized by the batch as usual (biased variance) and sigma = sqrt(variance + eps). Where nothing is clipped, the
    output is normalized by the running statistics, as in inference. r and d are constants in the backward and are computed before
    this batch updates the running statistics. The layer's `running_variance` decides whether the running variance averages unbiased
    or biased variances. The paper averages sigma; this source averages the variance, as Keras does and torch's checkpoints expect.

    The bounds grow with the layer's `num_batches_tracked`, on the device. For `warmup` batches r_max = 1 and d_max = 0, which is plain
    batch normalization. Then they grow linearly, r_max until batch 8 · warmup and d_max until 5 · warmup (the paper's section 4: 5000,
    40000, 25000). A checkpoint that was trained for longer starts with the full bounds.

    Args:
        r_max: at least 1.
        d_max: at least 0, in standard deviations.
        warmup: number of batches with plain batch normalization; 0 for the full bounds at once.

    Raises:
        InputError: on a bound or a warmup out of range.
        StateError: when used by a layer without running statistics.
        DTypeError: on complex input.
    """

    infers_by_running_statistics: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = True

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 5000

    def __post_init__(self) -> None:
        if not (self.r_max >= 1 and self.d_max >= 0 and self.warmup >= 0):
            raise InputError(f"r_max must be at least 1, d_max and warmup at least 0, but got {self}")
        if self.warmup and not (math.isfinite(self.r_max) and math.isfinite(self.d_max)):
            raise InputError(f"with a warmup, r_max and d_max must be finite, but got {self}; or use warmup=0")

    def __call__(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None = None
    ) -> Tensor:
        if self.r_max == 1 and self.d_max == 0:
            return train_or_infer(layer, x, residual, mask, by_replicas, weights=weights)
        y = self._on_fast_path(layer, x, residual, mask) if weights is None else None
        return train_or_infer(layer, x, residual, mask, self._corrected, weights=weights) if y is None else y

    def _on_fast_path(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor | None:
        call = partial(
            train_on_fast_path,
            layer,
            x,
            residual,
            mask,
            "renormalization",
            bounds=(self.r_max, self.d_max, self.warmup),
        )
        if not (layer.training and recomputed.is_needed()):
            return call()
        mean, variance, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if torch.is_grad_enabled() or recomputing() or mean is None or variance is None or batches is None:
            return None
        before = Buffers(mean, variance, batches).copy()
        return call(observe=lambda statistics: recomputed.store(layer, statistics[0], statistics[1], before))

    def bounds(self, batches: Tensor) -> tuple[Tensor, Tensor]:
        """r_max and d_max after this number of batches, both 0-d float64."""
        if self.warmup == 0:
            full = partial(torch.full, (), dtype=torch.float64, device=batches.device)
            return full(self.r_max), full(self.d_max)
        after = batches.to(torch.float64) - self.warmup
        r_step, d_step = (self.r_max - 1) / (7 * self.warmup), self.d_max / (4 * self.warmup)
        return (1 + after * r_step).clamp(1, self.r_max), (after * d_step).clamp(0, self.d_max)

    def _corrected(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, Moments]:
        mean, variance, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if mean is None or variance is None or batches is None:
            raise StateError(
                "renormalization compares the batch with running statistics, but this layer has none; build it with "
                "track_running_stats=True"
            )
        now = Buffers(mean, variance, batches)

        def normalized(buffers: Buffers) -> tuple[Tensor, Moments]:
            toward = Renormalization(*buffers[:2], *self.bounds(buffers.num_batches_tracked))
            return by_batch(layer, x, residual, mask, weights, reducer_of(layer), renormalization=toward)

        def key(batch: Moments) -> tuple[Tensor, Tensor]:
            return batch.mean, (batch.variance() + layer.eps).rsqrt()

        if not recomputed.is_needed():
            return normalized(now)
        if not recomputing():
            with unseen_by_checkpoints():
                before = now.copy()
            y, batch = normalized(before)
            with torch.no_grad(), unseen_by_checkpoints():
                recomputed.store(layer, *key(batch), before)
            return y, batch
        with torch.no_grad(), unseen_by_checkpoints():
            batch, reducer = moments(x, mask, weights=weights), reducer_of(layer)
            batch = batch if reducer is None else reducer.merge(batch)
            now = recomputed.look_up(layer, *key(batch), now)
        return normalized(now)
