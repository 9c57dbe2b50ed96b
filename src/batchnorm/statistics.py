"""Where the normalizing statistics come from, as parts a layer is given: `BatchNorm2d(64, statistics=Running())`.

A part is stateless: what it remembers lives in the layer's buffers, so that every layer has the state_dict of torch's and a checkpoint
of any part loads into any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from batchnorm.errors import DTypeError, InputError, StateError
from batchnorm.functional import (
    Reducer,
    check_several_values,
    is_single_value,
    moments,
    move_running_statistics,
    normalize,
    normalize_with,
)
from batchnorm.functional.autograd import differentiated_by_torch
from batchnorm.kernels import Activation
from batchnorm.moments import Moments


class Layer(Protocol):
    """What a part sees of the layer it serves; the names are those of `torch.nn.BatchNorm2d` and of `layers.BatchNorm`."""

    training: bool
    eps: float
    momentum: float | None
    track_running_stats: bool
    activation: Activation | None
    running_variance: str
    on_single: str
    on_nonfinite: str
    reducer: Reducer | None

    @property
    def gamma(self) -> Tensor | None: ...
    @property
    def beta(self) -> Tensor | None: ...

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    num_nonfinite_batches: Tensor | None


class Statistics(Protocol):
    """A source of statistics: normalizes x (N, C, *S) for a layer, and moves the layer's buffers if that is its way."""

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """The layer's output for x, of x's shape and dtype."""
        ...


@dataclass(frozen=True)
class Batch:
    """The paper's: batch statistics in training, running statistics in inference (Ioffe & Szegedy 2015, Algorithms 1 and 2).

    A layer without running statistics normalizes by the batch in inference as well, as torch's does.
    """

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        return _train_or_infer(layer, x, residual, mask, _by_replicas)


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
        return _train_or_infer(layer, x, residual, mask, self._by_replicas, self.size)

    def _by_replicas(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Moments]:
        """Groups are a replica's own; only what moves the running statistics is merged."""
        y, pooled = _by_batch(layer, x, residual, mask, group_size=self.size)
        reducer = _reducer_of(layer)
        return y, pooled if reducer is None else reducer.merge(pooled.detach())


@dataclass(frozen=True)
class Renorm:
    """Batch renormalization (Ioffe 2017, arXiv:1702.03275, Algorithm 1): for small batches, and batches that are no random sample.

        y = gamma · (x̂ · r + d) + beta
        r = clip(sigma / running sigma, 1 / r_max, r_max)      d = clip((mean - running mean) / running sigma, -d_max, d_max)

    with x̂ normalized by the batch as always (variance biased) and sigma = sqrt(variance + eps). Where nothing is clipped the output is
    that of the running statistics, as in inference. r and d are constants in the backward; the statistics they are taken from are
    those before this batch moves them. What the running variance follows is the layer's `running_variance`; the paper averages
    sigma, we the variance, as Keras does, so that checkpoints stay torch's.

    The bounds grow with the layer's `num_batches_tracked`, on the device: r_max = 1 and d_max = 0, which is plain batch
    normalization, for `warmup` batches; then linearly, r_max until batch 8 · warmup and d_max until 5 · warmup (the paper's section
    4: 5000, 40000, 25000). A checkpoint that was trained for longer starts with the full bounds.

    Args:
        r_max: at least 1.
        d_max: at least 0, in deviations.
        warmup: batches of plain batch normalization; 0 for the full bounds at once.

    Raises:
        InputError: on a bound or a warmup out of range.
        StateError: when used by a layer without running statistics.
        DTypeError: on complex input.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 5000

    def __post_init__(self) -> None:
        if not (self.r_max >= 1 and self.d_max >= 0 and self.warmup >= 0):
            raise InputError(f"r_max must be at least 1, d_max and warmup at least 0, but got {self}")

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        plain = self.r_max == 1 and self.d_max == 0
        return _train_or_infer(layer, x, residual, mask, _by_replicas if plain else self._corrected)

    def bounds(self, batches: Tensor) -> tuple[Tensor, Tensor]:
        """r_max and d_max after so many batches, both 0-d float64."""
        after = batches.to(torch.float64) - self.warmup
        grown = [(after / max(span * self.warmup, 1)).clamp(0, 1) for span in (7, 4)]
        if self.warmup == 0:
            grown = [torch.ones_like(after)] * 2
        return 1 + (self.r_max - 1) * grown[0], self.d_max * grown[1]

    def _corrected(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Moments]:
        mean, variance, batches = layer.running_mean, layer.running_var, layer.num_batches_tracked
        if mean is None or variance is None or batches is None:
            raise StateError(
                "renormalization compares the batch with running statistics, but this layer has none; build it with "
                "track_running_stats=True"
            )
        if x.is_complex():
            raise DTypeError("renormalization takes real input, but got complex; use Batch() for it")
        batch = moments(x, mask)
        reducer = _reducer_of(layer)
        batch = batch if reducer is None else reducer.merge(batch).detach()
        with torch.no_grad():
            r_max, d_max = (bound.to(batch.mean.dtype) for bound in self.bounds(batches))
            running_rstd = (variance.to(batch.mean.dtype) + layer.eps).rsqrt()
            r = ((batch.variance() + layer.eps).sqrt() * running_rstd).clamp(1 / r_max, r_max)
            d = ((batch.mean - mean) * running_rstd).clamp(-d_max, d_max)
        dtype = torch.promote_types(x.dtype, torch.float32)
        gamma, beta = layer.gamma, layer.beta
        for parameter in (gamma, beta):
            dtype = dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
        weight = (r if gamma is None else r * gamma).to(dtype)
        bias = d if gamma is None else d * gamma
        bias = (bias if beta is None else bias + beta).to(dtype)
        y, _ = normalize(
            x,
            weight,
            bias,
            layer.eps,
            activation=layer.activation,
            residual=residual,
            mask=mask,
            reducer=reducer,
            moments=batch,
        )
        return y, batch


@dataclass(frozen=True)
class Running:
    """The running statistics, in training too: a frozen layer. Its affine parameters still learn, its buffers never move.

    No sample sees another, so gradients of single samples (differential privacy, `torch.func.vmap` over `grad`) are well defined.

    Attributes:
        before: the part that `freeze` replaced and `unfreeze` puts back; None is `Batch()`.
        learned: names of the parameters that `freeze` stopped, and `unfreeze` lets learn again.
    """

    before: Statistics | None = field(default=None, repr=False)
    learned: tuple[str, ...] = field(default=(), repr=False)

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        return _by_running_statistics(layer, x, residual, mask)


_Normalized = Callable[["Layer", Tensor, Tensor | None, Tensor | None], tuple[Tensor, Moments]]


def _train_or_infer(
    layer: Layer,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    normalized: _Normalized,
    size: int | None = None,
) -> Tensor:
    """What all parts that learn from the batch share: inference, single values, and moving the running statistics.

    `size` is the samples that share statistics; None is all.
    """
    if not layer.training and layer.running_mean is not None:
        return _by_running_statistics(layer, x, residual, mask)
    moves = layer.training and layer.track_running_stats
    group = x if size is None else x[:size]
    shared = size is None and _reducer_of(layer) is not None  # with other replicas, which may bring more values
    if not shared and is_single_value(group):
        if layer.on_single == "running":
            return _by_running_statistics(layer, x, residual, mask)
        if layer.on_single == "error":
            check_several_values(group)
        moves = False
        if size is None:
            normalized = _by_batch
    y, moments = normalized(layer, x, residual, mask)
    if moves and layer.running_mean is not None and layer.running_var is not None:
        _move(layer, layer.running_mean, layer.running_var, moments)
    return y


def _by_replicas(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Moments]:
    return _by_batch(layer, x, residual, mask, _reducer_of(layer))


def _by_batch(
    layer: Layer,
    x: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    reducer: Reducer | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, Moments]:
    return normalize(
        x,
        layer.gamma,
        layer.beta,
        layer.eps,
        activation=layer.activation,
        residual=residual,
        mask=mask,
        reducer=reducer,
        group_size=group_size,
    )


def _reducer_of(layer: Layer) -> Reducer | None:
    """What merges this layer's statistics with those of other replicas: in training, where there are others."""
    reducer = layer.reducer if layer.training else None
    return None if reducer is None or reducer.size == 1 else reducer


def _by_running_statistics(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    if layer.running_mean is None or layer.running_var is None:
        raise StateError(
            "normalizing by running statistics needs them, but this layer has none; build it with track_running_stats=True"
        )
    return normalize_with(
        x,
        layer.running_mean,
        layer.running_var,
        layer.gamma,
        layer.beta,
        layer.eps,
        activation=layer.activation,
        residual=residual,
        mask=mask,
    )


def _move(layer: Layer, running_mean: Tensor, running_var: Tensor, moments: Moments) -> None:
    """Move the running statistics by one batch and count it, unless it is empty or not finite; no host synchronization."""
    counter = layer.num_batches_tracked
    momentum = layer.momentum
    if momentum is None:  # the mean of all batches so far: the n-th weighs 1/n
        if counter is None:
            raise StateError("momentum=None averages over all batches and needs the counter num_batches_tracked")
        momentum = 1.0 / (counter + 1).to(moments.mean.dtype)
    raises = layer.on_nonfinite == "error" and _can_wait_for(running_mean)
    finite = move_running_statistics(
        running_mean,
        running_var,
        moments,
        momentum,
        unbiased=layer.running_variance == "unbiased",
        skip_nonfinite=layer.on_nonfinite != "propagate",
        counters=(counter, None if raises else layer.num_nonfinite_batches),
    )
    if raises and finite is not None and not finite:
        raise InputError(
            f"the statistics of a batch must be finite in {running_mean.dtype}, but its input holds NaN or Inf, or values too "
            'large; the running statistics did not move. Find the batch, or use on_nonfinite="skip" to pass over it'
        )


def _can_wait_for(value: Tensor) -> bool:
    return not (value.is_meta or torch.compiler.is_compiling() or differentiated_by_torch())
