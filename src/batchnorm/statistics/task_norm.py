"""Statistics of a task's support set, blended with those of each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from batchnorm.errors import DTypeError, InputError, StateError
from batchnorm.functional import check_input, check_several_values, is_single_value, recomputing
from batchnorm.functional.autograd import exporting
from batchnorm.functional.checks import check_eps, epilogue_of
from batchnorm.functional.exported import constants
from batchnorm.functional.joint import Joint
from batchnorm.kernels import Epilogue
from batchnorm.kernels.eager import wide_dtype
from batchnorm.moments import Moments, divisor_of
from batchnorm.statistics.common import reducer_of, train_or_infer
from batchnorm.statistics.contract import Layer, SourceParameter
from batchnorm.statistics.episode import Support, current_pass

Blend = Literal["instance", "layer", "none"]
_PARAMETERS = ("statistics_scale", "statistics_offset")


@dataclass(frozen=True)
class TaskNorm:
    """Statistics of a task's support set, blended with those of each sample (Bronskill et al. 2020, arXiv:2003.03284).

        mean     = alpha · mean_s + (1 - alpha) · mean_i
        variance = alpha · (var_s + (mean_s - mean)²) + (1 - alpha) · (var_i + (mean_i - mean)²)
        alpha    = sigmoid(scale · |D| + offset)

    where s stands for the support set, |D| is its number of samples, and i stands for the sample itself: its own moments in each
    channel ("instance", TaskNorm-I) or over all channels ("layer", TaskNorm-L). All variances are biased. The layer gets two
    parameters, `statistics_scale` and `statistics_offset`, (1,) each, which start at 0, so alpha starts at 1/2. "none" fixes alpha
    at 1 and has no parameters: queries are normalized by the support set alone (the paper's MetaBN).

    `Episode` says which forward is the support set's and which is the queries'. A query's output depends on the support set and on
    the query itself, not on other queries. The gradient flows through the moments of both. In training outside of an episode, a batch
    is its own support set. In training, the support set updates the running statistics, which nothing but `freeze` uses.
    Several replicas merge only what updates them: each has tasks of its own.

    Args:
        blend: "instance", "layer" or "none".

    Raises:
        InputError: on another blend; on an instance of one value per channel, such as (N, C) input, whose moments say nothing.
        StateError: in inference outside of an episode; under `as_one_batch`; if activation checkpointing recomputes the layer.
        DTypeError: on complex input.
    """

    blend: Blend = "instance"

    def __post_init__(self) -> None:
        if self.blend not in get_args(Blend):
            raise InputError(f"blend must be one of {', '.join(map(repr, get_args(Blend)))}, but got {self.blend!r}")

    def __call__(self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        episode = current_pass()
        if not torch.compiler.is_compiling() and recomputing():
            raise StateError(
                "TaskNorm normalizes by what the forwards of an episode stored, in their order, but activation checkpointing runs this one "
                "again; call the model without checkpointing"
            )
        self._check(layer, x)
        if episode is not None and episode.over_queries:
            return self._normalized(layer, x, residual, mask, episode.look_up(layer))[0]
        if layer.training:
            return train_or_infer(layer, x, residual, mask, self._of_support, x.shape[0])
        if episode is None:
            raise StateError(
                "TaskNorm needs statistics of a support set in inference, but there is no episode; forward the support set within `with "
                "episode.support():` and the queries within `with episode.query():`, where episode = batchnorm.Episode()"
            )
        if layer.on_single == "error":
            check_several_values(x)
        return self._of_support(layer, x, residual, mask)[0]

    def layer_parameters(self) -> dict[str, SourceParameter]:
        return {} if self.blend == "none" else dict.fromkeys(_PARAMETERS, SourceParameter())

    def _check(self, layer: Layer, x: Tensor) -> None:
        check_input(x, {"weight": layer.gamma, "bias": layer.beta})
        check_eps(layer.eps)
        if x.is_complex():
            raise DTypeError("TaskNorm takes real input, but got complex; use Batch() for it")
        if self.blend == "instance" and is_single_value(x[:1]):
            raise InputError(
                f"an instance must have more than one value per channel, but the input is {tuple(x.shape)}; use TaskNorm('layer'), "
                "which takes the moments of a sample over its channels, or TaskNorm('none')"
            )

    def _of_support(
        self,
        layer: Layer,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        weights: Tensor | None = None,  # noqa: ARG002 (always None: this source takes none)
    ) -> tuple[Tensor, Moments]:
        """Normalize a support set, and store its moments if there is an episode."""
        episode, reducer = current_pass(), reducer_of(layer)
        if isinstance(reducer, Joint):
            raise StateError(
                "the support set of TaskNorm is one batch, but as_one_batch forwards micro-batches; forward it at once, or use Batch()"
            )
        if episode is not None and not x.numel():
            raise InputError(
                f"a support set must have at least one sample, but the input is {tuple(x.shape)}; forward its samples within "
                "`with episode.support():`"
            )
        y, support, moments = self._normalized(layer, x, residual, mask, None)
        if episode is not None:
            episode.store(layer, support)
        count = moments.count.flatten()[0] if isinstance(moments.count, Tensor) else moments.count
        found = Moments(count, moments.mean.flatten(), moments.m2.flatten())
        found = constants(found) if exporting() else found.detach()
        return y, found if reducer is None or layer.running_mean is None else reducer.merge(found)

    def _normalized(
        self, layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None, support: Support | None
    ) -> tuple[Tensor, Support, Moments]:
        """The output, the support set's moments and those of the batch, which are the support set's unless given."""
        epilogue = epilogue_of(x, layer.gamma, layer.beta, layer.activation, residual, mask)
        mask = epilogue.mask
        wide = _masked(x.to(wide_dtype(x)), mask)
        places = [*range(2, x.dim())]
        batch = Moments(0, x, x)
        if support is None:
            batch = _moments(wide, mask, [0, *places])
            support = Support(batch.mean, batch.variance(), x.shape[0])
        mean, variance, samples = support
        if self.blend != "none":
            own = _moments(wide, mask, places if self.blend == "instance" else [1, *places])  # (N, C or 1, 1, ...)
            alpha = self._alpha(layer, samples, wide)
            blended = torch.lerp(own.mean, mean, alpha)
            variance = torch.lerp(
                own.variance() + (own.mean - blended).square(), variance + (mean - blended).square(), alpha
            )
            mean = blended
        return _affine((wide - mean) * (variance + layer.eps).rsqrt(), epilogue, x), support, batch

    def _alpha(self, layer: Any, samples: int, like: Tensor) -> Tensor:
        """The weight of the support set, (1,)."""
        scale, offset = (getattr(layer, name).to(like) for name in _PARAMETERS)
        return (scale * samples + offset).sigmoid()


def _moments(x: Tensor, mask: Tensor | None, axes: list[int]) -> Moments:
    """Moments over some axes of x, which stay with size 1; differentiable. Of what the mask counts; x is 0 elsewhere."""
    count: int | Tensor = 1
    for axis in axes:
        count = count * x.shape[axis]
    if mask is not None:
        count = mask.expand_as(x).to(x.dtype).sum(axes, keepdim=True)
    mean = x.sum(axes, keepdim=True) / divisor_of(count)
    return Moments(count, mean, _masked(x - mean, mask).square().sum(axes, keepdim=True))


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else torch.where(mask, value, 0)


def _affine(normalized: Tensor, epilogue: Epilogue, x: Tensor) -> Tensor:
    """What follows x̂, in x's dtype: weight, bias, residual, activation and mask."""
    z = normalized
    along = (-1, *[1] * (x.dim() - 2))  # (C, 1, ...)
    if epilogue.weight is not None:
        z = z * epilogue.weight.to(z).view(along)
    if epilogue.bias is not None:
        z = z + epilogue.bias.to(z).view(along)
    if epilogue.residual is not None:
        z = z + _masked(epilogue.residual.to(z), epilogue.mask)
    y = z if epilogue.activation is None else epilogue.activation(z)
    return _masked(y, epilogue.mask).to(x.dtype)
