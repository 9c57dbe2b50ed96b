"""The layers: torch's constructor, checks, attributes and state_dict, with our statistics, kernels and options.

`BatchNorm` takes input of any rank. `BatchNorm1d`, `2d` and `3d` check the rank as torch's do and are instances of torch's classes,
so that code asking `isinstance(module, nn.BatchNorm2d)` finds them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import init
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer

from batchnorm import memory
from batchnorm.errors import ArgumentError, InputError, ShapeError
from batchnorm.functional import Reducer, check_residual, counter_on, mask_of
from batchnorm.functional.checks import mask_along_channels
from batchnorm.kernels import Activation, parse
from batchnorm.logs import logger
from batchnorm.statistics import Applying, Batch, Statistics, kept_by

_CHOICES = {
    "running_variance": ("unbiased", "biased"),
    "on_single": ("error", "running", "skip"),
    "on_nonfinite": ("skip", "propagate", "error"),
    "padded": ("zero", "input"),
}
OPTIONS = (
    "activation",
    "statistics",
    "channel_axis",
    "reducer",
    *_CHOICES,
    "save_memory",
)  # what a layer of ours has beyond torch's
STATISTICS = ("running_mean", "running_var")
_KEPT = ("running_mean_", "running_var_", "num_batches_tracked_")  # how the names begin that parts keep


class BatchNorm(_BatchNorm):
    """Batch normalization over every axis but the channel's (Ioffe & Szegedy 2015, arXiv:1502.03167).

        y = activation(weight · (x - mean) / sqrt(variance + eps) + bias + residual)

    In training mean and variance are those of the batch (variance biased), and the running statistics follow them; in inference
    they are the running ones. State, names and defaults are torch's, checkpoints go both ways.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance; in units of x squared.
        momentum: the weight of the new batch in the running statistics, so a larger one follows faster; None averages all batches
            alike.
        affine: learn weight (gamma) and bias (beta), (C,) each.
        track_running_stats: keep running statistics; without them inference normalizes by the batch too.
        device: of parameters and buffers.
        dtype: of parameters and input. Running statistics are float32 where it is narrower (see `keep_wide_statistics`).
        bias: learn beta beside gamma.
        activation: applied in the same pass: None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", or torch's module.
        statistics: where the statistics come from, a part of `batchnorm.statistics`; None is `Batch()`.
        channel_axis: the axis of the channels; -1 for (N, L, C) or (N, H, W, C).
        running_variance: "unbiased" (torch, and the paper's section 3.1) or "biased" (Keras, Flax, ONNX).
        on_single: what one value per channel does in training: "error" (torch), "running" normalizes it by the running statistics,
            "skip" by its own (its output is the bias); neither moves the running statistics. Where it is a mask that leaves one value,
            "error" does as "skip" does: to refuse it would wait for the device.
        on_nonfinite: what a batch with NaN or Inf does to the running statistics: "skip" leaves them and counts the batch in
            `num_nonfinite_batches`, "propagate" is torch's, "error" raises (which waits for the device; where nothing can be waited
            for, in compiled code, under `torch.func` and on the meta device, it is "skip").
        padded: what the output is where mask or lengths say that nothing counts: "zero", or the "input", untouched.

    Attributes:
        weight, bias: (C,) parameters or None; `gamma` and `beta` are the same objects.
        running_mean, running_var: (C,) buffers or None.
        num_batches_tracked: 0-d int64 buffer, how many batches moved the running statistics.
        num_nonfinite_batches: 0-d int64 tensor or None, how many were skipped. No buffer, and not in the state_dict.
        reducer: what merges the batch statistics with those of other replicas, see `batchnorm.synchronize`; None for none.
        save_memory: whether the output is computed again in the backward, in a model that `convert(save_memory=True)` prepared.
        keep_wide_statistics: set it to False before `.half()` or `.bfloat16()` to let the running statistics be cast too.

    Shape:
        input (N, C, *S) with the channels on `channel_axis`; output the same. residual: input's shape. mask: bool, (N, *S) or
        broadcastable to it, True counts; where False, output and gradient are 0 (see `padded`). lengths: (N,), integers: so many
        positions of the last axis that is not the channels' count. A nested tensor of torch.jagged layout, its axes the input's, has
        no padding, and what lies between its samples (`torch.nested.narrow`) counts as little; its residual is one with the same offsets.

    Raises:
        InputError: on a rank or an option out of range; on one value per channel in training.
        ShapeError: on sizes that do not fit together.
        DTypeError: on integer input.
    """

    activation: Activation | None = None
    statistics: Statistics = Batch()
    channel_axis: int = 1
    running_variance: str = "unbiased"
    on_single: str = "error"
    on_nonfinite: str = "skip"
    padded: str = "zero"
    reducer: Reducer | None = None
    keep_wide_statistics: bool = True
    save_memory: bool = False
    _nonfinite_batches: Tensor | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | nn.Module | Activation | None = None,
        statistics: Statistics | None = None,
        channel_axis: int = 1,
        running_variance: str = "unbiased",
        on_single: str = "error",
        on_nonfinite: str = "skip",
        padded: str = "zero",
    ) -> None:
        num_features = _integer(num_features, "num_features")
        if num_features < 1:
            raise InputError(f"num_features must be at least 1, but got {num_features}; it is the number of channels")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            self.bias = None
        self._set_options(
            activation=parse(activation),
            statistics=Batch() if statistics is None else statistics,
            channel_axis=channel_axis,
            running_variance=running_variance,
            on_single=on_single,
            on_nonfinite=on_nonfinite,
            padded=padded,
        )
        self._prepare_buffers()

    @property
    def gamma(self) -> Tensor | None:
        """The tutorial's name of `weight`."""
        return self.weight

    @property
    def beta(self) -> Tensor | None:
        """The tutorial's name of `bias`."""
        return self.bias

    @property
    def num_nonfinite_batches(self) -> Tensor | None:
        """How many batches were skipped, 0-d int64; None where `num_batches_tracked` is.

        It is no buffer: code that pairs the buffers of two models, such as an average of weights made before `convert`, would meet one
        too many, and what fills the buffers of a model built without memory (meta device) would find no value for it. So it is made
        anew wherever `num_batches_tracked` went without it.
        """
        beside, counter = self._buffers.get("num_batches_tracked"), self._nonfinite_batches
        if beside is None:
            return None
        if counter is None or counter.device != beside.device:
            counter = self._nonfinite_batches = counter_on(beside.device, counter)
        return counter

    @num_nonfinite_batches.deleter
    def num_nonfinite_batches(self) -> None:
        self.__dict__.pop("_nonfinite_batches", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "num_nonfinite_batches" in self._buffers:  # pickled when it was one
            self._nonfinite_batches = self._buffers.pop("num_nonfinite_batches")
            self._non_persistent_buffers_set.discard("num_nonfinite_batches")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__({"gamma": "weight", "beta": "bias"}.get(name, name), value)
        if name == "statistics":
            self._keep_buffers()

    def __delattr__(self, name: str) -> None:
        super().__delattr__({"gamma": "weight", "beta": "bias"}.get(name, name))

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        activation: Activation | None = None,
    ) -> Tensor:
        """Normalize; see the class for shapes and errors. `activation` is applied in this call, in place of the layer's own."""
        if isinstance(input, fx.Proxy):  # a leaf to torch.fx, as torch's own layers are
            path = input.tracer.path_of_module(self)  # pyright: ignore[reportAttributeAccessIssue]
            named = (("residual", residual), ("mask", mask), ("lengths", lengths))
            given = {name: value for name, value in named if value is not None}
            proxy: Any = input.tracer.create_proxy("call_module", path, (input,), given)  # pyright: ignore
            return proxy if activation is None else activation(proxy)
        self._check_input_dim(input)
        if memory.passes_over(self.save_memory):
            with memory.passing_over():
                return self._normalize(input, residual, mask, lengths, activation)
        return self._normalize(input, residual, mask, lengths, activation)

    def _normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        if input.is_nested:
            return self._normalize_nested(input, residual, mask, lengths, activation)
        if self.channel_axis == 1:
            return self._normalize_dense(input, residual, mask, lengths, activation)
        axis = self._axis(input)
        if residual is not None:
            check_residual(residual, input)
            residual = residual.movedim(axis, 1)
        return self._normalize_dense(input.movedim(axis, 1), residual, mask, lengths, activation).movedim(1, axis)

    def _normalize_dense(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        if lengths is not None:
            mask = mask_of(lengths, mask, x)
        seen: Any = self if activation is None else Applying(self, activation)
        y = self.statistics(seen, x, residual, mask)
        if mask is None or self.padded == "zero":
            return y
        return torch.where(mask_along_channels(mask, x), y, x)

    def _normalize_nested(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        activation: Activation | None,
    ) -> Tensor:
        """The positions of all samples as one batch (M, C, *rest), and back."""
        if input.layout != torch.jagged:
            raise ArgumentError(
                f"a nested input must have the layout torch.jagged, but has {input.layout}; build it with "
                "torch.nested.nested_tensor(..., layout=torch.jagged)"
            )
        if mask is not None or lengths is not None:
            raise ArgumentError("a nested input has no padding, but a mask or lengths came with it; leave them out")
        jagged: Any = input
        axis, ragged = self._axis(input) - 1, jagged._ragged_idx - 1  # of the values, which have no batch axis
        if axis == ragged:
            raise InputError(
                f"the channels must be on an axis of one size, but axis {axis + 1} is the ragged one of {input.shape}; set channel_axis"
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
        y = self._normalize_dense(x, residual, between, None, activation).movedim((0, 1), (ragged, axis))
        return torch.nested.nested_tensor_from_jagged(y, offsets, held, jagged_dim=ragged + 1)

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, counters 0."""
        super().reset_running_stats()
        self._count_anew()
        for name, kept in kept_by(self.statistics).items():
            buffer = self._buffers.get(name)
            if buffer is not None:
                buffer.copy_(kept.start(self._buffers[kept.like]))  # pyright: ignore[reportArgumentType] (where one is, so is the other)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics as new."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Torch's, and our options where they differ from the default."""
        options = [
            f"{name}={value if name == 'activation' else repr(value)}"
            for name in OPTIONS
            if (value := getattr(self, name)) != getattr(BatchNorm, name)
        ]
        return ", ".join([super().extra_repr(), *options])

    def _axis(self, input: Tensor) -> int:
        """The channel axis, counted from the front."""
        if not -input.dim() <= self.channel_axis < input.dim():
            raise InputError(f"channel_axis={self.channel_axis} is out of range for {input.dim()}D input")
        axis = self.channel_axis % input.dim()
        if axis == 0:
            raise InputError(
                f"channel_axis={self.channel_axis} of {input.dim()}D input is axis 0, the batch's; name another axis"
            )
        return axis

    def _check_input_dim(self, input: Tensor) -> None:
        if _rank(input) < 2:
            raise InputError(
                f"expected input of at least 2D, (N, C, *S) (got {input.dim()}D input); add the missing axis with unsqueeze"
            )

    def _set_options(self, **options: Any) -> None:
        for name, choices in _CHOICES.items():
            if options[name] not in choices:
                raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, but got {options[name]!r}")
        options["channel_axis"] = _integer(options["channel_axis"], "channel_axis")
        if options["channel_axis"] == 0:
            raise InputError("channel_axis must be an axis other than 0, the batch's, but got 0")
        check_statistics(options["statistics"])
        for name, value in options.items():
            setattr(self, name, value)

    def _prepare_buffers(self) -> None:
        """What ours have beyond torch's: wide running statistics, and buffers of the source."""
        self._keep_buffers()
        self._widen_statistics({})
        self._count_anew()

    def _count_anew(self) -> None:
        beside = self._buffers.get("num_batches_tracked")
        self._nonfinite_batches = None if beside is None else counter_on(beside.device)

    def _keep_buffers(self) -> None:
        """The buffers that the part keeps here: new ones begin as it says, those of another part go."""
        wanted = kept_by(self.statistics)
        for name in [name for name in self._buffers if name.startswith(_KEPT) and name not in wanted]:
            del self._buffers[name]
        for name, kept in wanted.items():
            source, buffer = self._buffers.get(kept.like), self._buffers.get(name)
            if source is None or (buffer is not None and _fits(buffer, source)):
                continue
            if isinstance(source, UninitializedBuffer):
                self.register_buffer(name, UninitializedBuffer(device=source.device, dtype=source.dtype))  # pyright: ignore[reportCallIssue]
            else:
                self.register_buffer(name, kept.start(source).clone())

    def _widen_statistics(self, originals: dict[str, Tensor]) -> None:
        """Running statistics that became narrower than 32 bits per part are set back, from their originals where there are some.

        A running mean of bfloat16 stalls: with momentum 0.001 and data of mean 10 it never passes 4.
        """
        for name in (*STATISTICS, *kept_by(self.statistics)):
            buffer = self._buffers.get(name)
            if (
                not self.keep_wide_statistics
                or buffer is None
                or isinstance(buffer, UninitializedBuffer)
                or _is_wide(buffer)
            ):
                continue
            source = originals.get(name, buffer)
            dtype = torch.promote_types(source.dtype, torch.float32)
            self._buffers[name] = source.to(device=buffer.device, dtype=dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> BatchNorm:
        names = (*STATISTICS, *kept_by(self.statistics))
        originals = {name: buffer for name in names if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        self._widen_statistics(originals)
        beside = self._buffers.get("num_batches_tracked")
        if beside is not None:
            self._nonfinite_batches = counter_on(beside.device, self._nonfinite_batches)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Torch's, and the tutorial's checkpoints: `gamma`, `beta`, no counter, perhaps no running statistics."""
        if prefix + "gamma" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "gamma")
            if prefix + "beta" in state_dict:
                state_dict[prefix + "bias"] = state_dict.pop(prefix + "beta")
            lacking = [name for name in (*STATISTICS, "num_batches_tracked") if prefix + name not in state_dict]
            for name in lacking:
                if self._buffers.get(name) is not None:
                    state_dict[prefix + name] = self._buffers[name]
            if "running_mean" in lacking:
                logger.warning(
                    "%s: the checkpoint has gamma and beta but no running statistics; the layer keeps its own. "
                    "Run the training data through it in training mode before inference",
                    prefix.rstrip(".") or type(self).__name__,
                )
        self._match_kept_buffers(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._widen_statistics({})
        self._count_anew()  # the checkpoint does not have it

    def _match_kept_buffers(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Checkpoints of other parts: what they lack of this one's begins anew from what they have, and what they have more goes."""
        wanted = kept_by(self.statistics)
        for name, kept in wanted.items():
            source, given = state_dict.get(prefix + kept.like), state_dict.get(prefix + name)
            if kept.like == "num_batches_tracked" and source is None:  # older than the counter, which then stays
                source = self.num_batches_tracked
            other_window = given is not None and kept.rows is not None and given.shape[:1] != (kept.rows,)
            if source is not None and (given is None or other_window):
                state_dict[prefix + name] = kept.start(source).clone()  # with assign=True it becomes the buffer itself
        more = [key for key in state_dict if key.startswith(tuple(prefix + kept for kept in _KEPT))]
        for key in more:
            if key.removeprefix(prefix) not in wanted:
                del state_dict[key]
                logger.info("%s: left out of the checkpoint, it is of a part that this layer does not have", key)


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """`BatchNorm` of (N, C) or (N, C, L) input."""

    def _check_input_dim(self, input: Tensor) -> None:
        _expect_rank(input, 2, 3)


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """`BatchNorm` of (N, C, H, W) input."""

    def _check_input_dim(self, input: Tensor) -> None:
        _expect_rank(input, 4)


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """`BatchNorm` of (N, C, D, H, W) input."""

    def _check_input_dim(self, input: Tensor) -> None:
        _expect_rank(input, 5)


def check_statistics(statistics: Any) -> None:
    """Refuse what is no part of `batchnorm.statistics`.

    Raises:
        InputError: saying what came.
    """
    if not callable(statistics) or isinstance(statistics, type):
        raise InputError(
            f"statistics must be a part of batchnorm.statistics such as Batch() or Running(), but got {statistics!r}"
        )


def _fits(buffer: Tensor, source: Tensor) -> bool:
    """Whether a source's buffer has the channels of the layer; where it has not, it begins anew."""
    lazy = isinstance(buffer, UninitializedBuffer) or isinstance(source, UninitializedBuffer)
    return lazy or source.dim() == 0 or buffer.shape[-1:] == source.shape[-1:]


def _within(offsets: Tensor, lengths: Tensor, positions: int) -> Tensor:
    """Which positions belong to a sample, (M,) bool, where the samples of a nested tensor have gaps between them."""
    steps = torch.zeros(positions + 1, dtype=offsets.dtype, device=offsets.device)
    ones = torch.ones_like(lengths, dtype=offsets.dtype)
    starts = offsets[:-1]  # (N,)
    return steps.index_add(0, starts, ones).index_add(0, starts + lengths, -ones)[:-1].cumsum(0) > 0


def _expect_rank(input: Tensor, *ranks: int) -> None:
    if _rank(input) not in ranks:
        wanted = " or ".join(f"{rank}D" for rank in ranks)
        raise InputError(
            f"expected {wanted} input (got {input.dim()}D input); reshape it, or use batchnorm.BatchNorm, which takes any rank"
        )


def _rank(input: Tensor) -> int:
    if not isinstance(input, Tensor):
        raise ArgumentError(f"input must be a tensor, but got {type(input).__name__}; convert it with torch.as_tensor")
    return input.dim()


def _integer(value: Any, name: str) -> int:
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return operator.index(value)
    raise ArgumentError(f"{name} must be an int, but got {value!r}")


def _is_wide(values: Tensor) -> bool:
    """Whether each number, or each part of a complex one, has at least 32 bits."""
    return values.element_size() >= (8 if values.is_complex() else 4)
