"""Running statistics mixed with those of the batch, in inference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from batchnorm.errors import InputError, StateError
from batchnorm.functional import is_single_value, moments, normalize_with
from batchnorm.statistics.common import by_batch, by_replicas, by_running_statistics, train_or_infer
from batchnorm.statistics.contract import Layer


@dataclass(frozen=True)
class Mixed:
    """In inference, running statistics mixed with those of the batch (Schneider et al. 2020, arXiv:2006.16971, section 3, equation 1).

        mean     = (prior · running_mean + n · batch_mean) / (prior + n)
        variance = (prior · running_var  + n · batch_var)  / (prior + n)

    where n is the number of samples of the batch, or the sum of their weights, and its variance is biased. The prior is the number
    of samples that the running statistics count for: 0 normalizes by the batch alone, infinity by the running statistics alone.
    Training is that of `Batch`. With a prior above 0, mean and variance are constants in the backward; with 0 the gradient flows
    through them, as in training.

    No buffer changes in inference. A sample's output depends on the others in its batch. `batchnorm.adapt` uses it.

    Args:
        prior: at least 0, in samples.
        smallest: batches of fewer samples are normalized by the running statistics, as is one value per channel if the prior is 0.

    Raises:
        InputError: on a prior below 0 or NaN, or smallest below 1.
        StateError: when used in inference by a layer without running statistics.
    """

    takes_weights: ClassVar[bool] = True

    prior: float = 16.0
    smallest: int = 1

    def __post_init__(self) -> None:
        if not self.prior >= 0 or self.smallest < 1:
            raise InputError(f"prior must be at least 0 and smallest at least 1, but got {self}")

    def __call__(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, weights: Tensor | None = None
    ) -> Tensor:
        if layer.training:
            return train_or_infer(layer, x, residual, mask, by_replicas, weights=weights)
        mean, variance = layer.running_mean, layer.running_var
        if mean is None or variance is None:
            raise StateError(
                "mixing needs running statistics, but this layer has none; build it with track_running_stats=True"
            )
        n = x.shape[0]
        if n < self.smallest or math.isinf(self.prior) or (self.prior == 0 and is_single_value(x)):
            return by_running_statistics(layer, x, residual, mask)
        if self.prior == 0:
            return by_batch(layer, x, residual, mask, weights)[0]
        batch = moments(x, mask, weights=weights)
        if weights is not None:  # without a mask, which leaves the number of samples as it is
            n = moments(x[:, :1], weights=weights).count / max(math.prod(x.shape[2:]), 1)
        share = n / (self.prior + n)
        return normalize_with(
            x,
            mean + share * (batch.mean - mean),
            variance + share * (batch.variance() - variance),
            layer.gamma,
            layer.beta,
            layer.eps,
            activation=layer.activation,
            residual=residual,
            mask=mask,
        )
