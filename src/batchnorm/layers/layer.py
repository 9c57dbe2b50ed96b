"""The layers: options, checks of the input, and the call.

`BatchNorm` takes input of any rank. `BatchNorm1d`, `2d` and `3d` check the rank as torch's do and are instances of torch's classes,
so that code asking `isinstance(module, nn.BatchNorm2d)` finds them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.nn import init

from batchnorm import memory
from batchnorm.errors import ArgumentError, InputError
from batchnorm.functional import Reducer, check_residual, mask_of
from batchnorm.functional.checks import check_weights, mask_along_channels
from batchnorm.functional.in_graph import infer as infer_in_graph
from batchnorm.kernels import Activation, parse
from batchnorm.layers.nested import normalize_nested
from batchnorm.layers.state import LayerState
from batchnorm.statistics import Applying, Batch, Statistics
from batchnorm.statistics.compiled import train_compiled
from batchnorm.statistics.contract import takes_weights

Function = TypeVar("Function", bound=Callable[..., Any])

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


def with_signature_of(other: Callable[..., Any]) -> Callable[[Function], Function]:
    """Show the signature of another function, where the function itself passes its arguments on."""

    def decorate(function: Function) -> Function:
        vars(function)["__signature__"] = inspect.signature(other)
        return function

    return decorate


def _bound(
    self: Any,  # noqa: ARG001 (the signature of a method)
    input: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    activation: Activation | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Activation | None, Tensor | None]:
    """The arguments of a layer's call, in order."""
    return input, residual, mask, lengths, activation, weights


class BatchNorm(LayerState):
    """Batch normalization over every axis but the channel's (Ioffe & Szegedy 2015, arXiv:1502.03167).

        y = activation(weight · (x - mean) / sqrt(variance + eps) + bias + residual)

    In training, mean and variance are those of the batch (the variance is biased), and they update the running statistics. In
    inference they are the running statistics. State, names and defaults are torch's; checkpoints load in both directions.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance; in units of x squared.
        momentum: the weight of the new batch in the running statistics; None gives all batches the same weight.
        affine: learn weight (gamma) and bias (beta), (C,) each.
        track_running_stats: have running statistics; without them inference normalizes by the batch too.
        device: of parameters and buffers.
        dtype: of parameters and input. Running statistics are float32 where it is narrower (see `keep_wide_statistics`).
        bias: learn beta beside gamma.
        activation: applied in the same pass: None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", or torch's module.
        statistics: the statistics source, from `batchnorm.statistics`; None is `Batch()`.
        channel_axis: the axis of the channels; -1 for (N, L, C) or (N, H, W, C).
        running_variance: "unbiased" (torch, and the paper's section 3.1) or "biased" (Keras, Flax, ONNX).
        on_single: what one value per channel does in training: "error" (torch), "running" normalizes it by the running statistics,
            "skip" by its own (its output is the bias); neither updates the running statistics. If a mask leaves one value, "error"
            acts as "skip": an error would have to wait for the device.
        on_nonfinite: what a batch with NaN or Inf does to the running statistics: "skip" leaves them and counts the batch in
            `num_nonfinite_batches`, "propagate" is torch's, "error" raises (which waits for the device; in compiled code,
            under `torch.func` and on the meta device, where waiting is impossible, it acts as "skip").
        padded: the output at positions that mask or lengths exclude: "zero", or the "input" itself.

    Attributes:
        weight, bias: (C,) parameters or None; `gamma` and `beta` are the same objects.
        running_mean, running_var: (C,) buffers or None.
        num_batches_tracked: 0-d int64 buffer, how many batches updated the running statistics.
        num_nonfinite_batches: 0-d int64 tensor or None, how many batches were skipped; not a buffer and not in the state_dict.
        reducer: merges the batch statistics with those of other replicas, see `batchnorm.synchronize`; None for none.
        save_memory: whether the output is computed again in the backward, in a model that `convert(save_memory=True)` prepared.
        keep_wide_statistics: set it to False before `.half()` or `.bfloat16()` to let the running statistics be cast too.

    Shape:
        input (N, C, *S) with the channels on `channel_axis`; output the same. residual: input's shape. mask: bool, (N, *S) or
        broadcastable to it, True counts; where False, output and gradient are 0 (see `padded`). lengths: (N,), integers: the number
        of valid positions along the last non-channel axis. weights: (N,) or broadcastable to (N, *S), floating or integers, at
        least 0: how often each sample, or position, counts in the statistics and their gradients; no output is multiplied by them.
        A nested tensor of torch.jagged layout has no padding; gaps between its samples (`torch.nested.narrow`) do not count. Its
        residual is a nested tensor with the same offsets, its weights are (N,).

    Raises:
        InputError: on a rank or an option out of range; on one value per channel in training; on weights that are negative or not
            finite, or that sum to at most 1.5 in training, on the CPU (on other devices see `functional.batch_norm`).
        ArgumentError: on weights for a statistics source that takes none, or on another device.
        ShapeError: on sizes that do not fit together.
        DTypeError: on integer input.
    """

    activation: Activation | None = None
    channel_axis: int = 1
    running_variance: str = "unbiased"
    on_single: str = "error"
    on_nonfinite: str = "skip"
    padded: str = "zero"
    reducer: Reducer | None = None
    save_memory: bool = False

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
        if statistics is not None:
            check_statistics(statistics)
        self._match_parameters_to_source(statistics, device, dtype)
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "statistics":
            self._match_parameters_to_source(value)
        super().__setattr__({"gamma": "weight", "beta": "bias"}.get(name, name), value)
        if name == "statistics":
            self._match_buffers_to_source()

    def __delattr__(self, name: str) -> None:
        super().__delattr__({"gamma": "weight", "beta": "bias"}.get(name, name))

    def _normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        activation: Activation | None,
        weights: Tensor | None,
    ) -> Tensor:
        if input.is_nested:
            if mask is not None or lengths is not None:
                raise ArgumentError("a nested input has no padding, but a mask or lengths came with it; leave them out")
            return normalize_nested(
                lambda x, beside, counted, weights: self._normalize_dense(
                    x, beside, counted, None, activation, weights
                ),
                input,
                residual,
                weights,
                self._axis(input),
            )
        if self.channel_axis == 1:
            return self._normalize_dense(input, residual, mask, lengths, activation, weights)
        axis = self._axis(input)
        if residual is not None:
            check_residual(residual, input)
            residual = residual.movedim(axis, 1)
        y = self._normalize_dense(input.movedim(axis, 1), residual, mask, lengths, activation, weights)
        return y.movedim(1, axis)

    @with_signature_of(_bound)
    def forward(self, input: Tensor, *given: Any, **named: Any) -> Tensor:
        """Normalize; see the class for shapes and errors. `activation` is applied in this call, in place of the layer's own.

        It takes what `_bound` does; compiled code compares each default of a parameter at each call of each layer.
        """
        if is_compiling():
            return self._forward_compiled(input, given, named)
        if type(input) is not Tensor:
            if isinstance(input, fx.Proxy):
                return self._traced(*_bound(self, input, *given, **named))
            check_tensor(input)
        self._check_input_dim(input)
        if memory.thread.saver is not None and not self.save_memory and memory.skips():
            with memory.skipping():
                return self._normalize(*_bound(self, input, *given, **named))
        if not given and not named and self.channel_axis == 1 and not input.is_nested:  # `_normalize` in fewer frames
            return self.statistics(self, input, None, None)
        return self._normalize(*_bound(self, input, *given, **named))

    def _traced(
        self, input: Any, residual: Any, mask: Any, lengths: Any, activation: Activation | None, weights: Any
    ) -> Any:
        """The node of a call in `torch.fx`, to which a layer is a leaf, as torch's own are."""
        path = input.tracer.path_of_module(self)
        named = (("residual", residual), ("mask", mask), ("lengths", lengths), ("weights", weights))
        given = {name: value for name, value in named if value is not None}
        proxy = input.tracer.create_proxy("call_module", path, (input,), given)
        return proxy if activation is None else activation(proxy)

    def _forward_compiled(self, input: Tensor, given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        """The same in compiled code. At each call it compares what was read here while it was traced, so the usual call reads little."""
        if input.__class__ is not Tensor:
            check_tensor(input)
        self._check_input_dim(input)
        residual = mask = lengths = activation = weights = None
        usual = self.channel_axis == 1 and not input.is_nested
        if given or named:
            _, residual, mask, lengths, activation, weights = _bound(self, input, *given, **named)
            usual = usual and mask is None and lengths is None and weights is None
        if usual and self.statistics.__class__ is Batch:
            applied = self.activation if activation is None else activation
            if self.training:
                y = train_compiled(self, applied, input, residual)
            else:
                running = self.running_mean, self.running_var
                y = infer_in_graph(input, self.weight, self.bias, running, self.eps, residual, applied)
            if y is not None:
                return y
        return self._normalize(input, residual, mask, lengths, activation, weights)

    def _normalize_dense(
        self,
        x: Tensor,
        residual: Tensor | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        activation: Activation | None,
        weights: Tensor | None,
    ) -> Tensor:
        if lengths is not None:
            mask = mask_of(lengths, mask, x)
        seen: Any = self if activation is None else Applying(self, activation)
        given = (seen, x, residual, mask)
        y = self.statistics(*given) if weights is None else self._weighted(weights, x)(*given, weights)
        if mask is None or self.padded == "zero":
            return y
        return torch.where(mask_along_channels(mask, x), y, x)

    def _weighted(self, weights: Tensor, x: Tensor) -> Any:
        """The source, for a call with these sample weights."""
        check_weights(weights, x)
        if not takes_weights(self.statistics):
            raise ArgumentError(
                f"weights need a statistics source that takes them, but {self.statistics!r} does not; leave them out, or use Batch()"
            )
        return self.statistics

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, running statistics as new."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)
        self._reset_source_parameters()

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
        if input.dim() < 2:
            _refuse(input, "input of at least 2D, (N, C, *S)", "add the missing axis with unsqueeze")

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


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """`BatchNorm` of (N, C) or (N, C, L) input."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3):
            _refuse(input, "2D or 3D input")


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """`BatchNorm` of (N, C, H, W) input."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            _refuse(input, "4D input")


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """`BatchNorm` of (N, C, D, H, W) input."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 5:
            _refuse(input, "5D input")


def check_statistics(statistics: Any) -> None:
    """Check that `statistics` is a statistics source.

    Raises:
        InputError: if it is not.
    """
    if not callable(statistics) or isinstance(statistics, type):
        raise InputError(
            f"statistics must be a statistics source such as batchnorm.statistics.Batch() or Running(), but got {statistics!r}"
        )


def check_tensor(input: Any) -> None:
    """Check that the input is a tensor.

    Raises:
        ArgumentError: if it is not.
    """
    if not isinstance(input, Tensor):
        raise ArgumentError(f"input must be a tensor, but got {type(input).__name__}; convert it with torch.as_tensor")


def _refuse(
    input: Tensor, wanted: str, remedy: str = "reshape it, or use batchnorm.BatchNorm, which takes any rank"
) -> NoReturn:
    raise InputError(f"expected {wanted} (got {input.dim()}D input); {remedy}")


def _integer(value: Any, name: str) -> int:
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return operator.index(value)
    raise ArgumentError(f"{name} must be an int, but got {value!r}")
