"""Records what the batch norms of a model get in training mode: moments of batches and of their pool, O(channels) for each batch."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm.diagnostics.norms import Norm
from batchnorm.functional import moments
from batchnorm.functional.checks import mask_of
from batchnorm.moments import Moments
from batchnorm.surgery.held import HeldInInference
from batchnorm.torch_state import disabled_torch_function, graph_task

SingleOutput = Literal["error", "NaN", "bias", "value"]  # for one value per channel
_LARGE_MEAN = 300  # deviations
PADDED_BATCHES = 4  # in how many batches constant tails are looked for


@dataclass
class Batch:
    """What one batch brought to a layer; `mean` and `var` are (C,) float64, biased.

    Attributes:
        samples: N of the first call.
        count: values per channel, of all calls.
        mean: of all values of a channel.
        var: of all values of a channel.
        sample_mean: mean of the samples' means.
        sample_var: sum of squared deviations of the samples' means from it.
        domain: of the running statistics that it updated, for layers with `Domains`; None is the first one.
    """

    samples: int
    count: float
    mean: Tensor
    var: Tensor
    sample_mean: Tensor
    sample_var: Tensor
    domain: str | None = None


@dataclass
class LayerRecord:
    """What a layer got in a pass.

    Attributes:
        norm: the layer.
        order: its place among the layers in the order of their first calls.
        trained: whether it ran in training mode.
        pool: moments of all its values.
        calls: moments by the domain of the call, and its number within a forward.
        batches: one entry for each batch with finite values, and each domain in it.
        nonfinite: number of batches with NaN or Inf.
        precision: that of the input's dtype, the distance from 1 to the next number.
        padding: share of values in constant tails of unequal length; 0 where a mask is given.
        kernel_error: error of the output, in deviations, measured where the layout is channels_last and the mean large.
        source: name of the convolution or linear layer whose output is its input, in every call; None if there is none.
        single: N of a batch that had one value per channel; 0 if there was none.
        single_output: what the layer made of it.
    """

    norm: Norm
    order: int
    trained: bool
    pool: Moments | None = None
    calls: dict[tuple[str | None, int], Moments] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    nonfinite: int = 0
    precision: float = 0.0
    padding: float = 0.0
    kernel_error: float = 0.0
    source: str | None = ""
    single: int = 0
    single_output: SingleOutput = "error"

    def by_domain(self) -> dict[str | None, LayerRecord]:
        """The record of each domain whose running statistics were updated; of most layers, itself."""
        domains = dict.fromkeys(domain for domain, _ in self.calls)
        if len(domains) < 2 and None in domains:
            return {None: self}
        return {domain: self._in(domain) for domain in domains}

    def _in(self, domain: str | None) -> LayerRecord:
        calls = {key: pool for key, pool in self.calls.items() if key[0] == domain}
        batches = [batch for batch in self.batches if batch.domain == domain]
        return replace(self, calls=calls, batches=batches, pool=functools.reduce(Moments.merge, calls.values()))


@dataclass
class Record:
    """What all layers got in a pass.

    Attributes:
        layers: by name, in the order of their first calls.
        batches: number of batches read.
        refused: the numbers of those that a layer refused, since it had one value per channel.
        nonfinite: the numbers of those that brought NaN or Inf to a layer.
    """

    layers: dict[str, LayerRecord] = field(default_factory=dict)
    batches: int = 0
    refused: set[int] = field(default_factory=set)
    nonfinite: set[int] = field(default_factory=set)


def divergence(mean: Tensor, var: Tensor, from_mean: Tensor, from_var: Tensor, eps: float) -> Tensor:
    """KL divergence of N(mean, var + eps) from N(from_mean, from_var + eps), (C,) in nats."""
    var, from_var = var + eps, from_var + eps
    ratio = var / from_var
    return 0.5 * (ratio + (mean - from_mean).square() / from_var - 1 - ratio.log())


def stacked(layer: LayerRecord) -> tuple[Tensor, Tensor]:
    """Means and variances of a layer's batches, (B, C) each."""
    return torch.stack([each.mean for each in layer.batches]), torch.stack([each.var for each in layer.batches])


@contextlib.contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Put a model in training mode as its training does: if it is in it already, each module keeps its mode."""
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        for module, _ in modes:
            if not isinstance(module, HeldInInference):
                module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def in_inference(model: nn.Module) -> Iterator[None]:
    """Put all modules of a model in inference mode, without calling `eval`, which some override to do more."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def input_of(norm: Norm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input of a call with its channels on axis 1, (N, C, *S); None if it cannot be recorded."""
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or x.is_nested or x.is_complex() or x.dim() < 2 or not x.is_floating_point():
        return None
    axis = getattr(norm.module, "channel_axis", 1)
    if norm.kind == "hand-written":
        size = next((value.numel() for value in norm.affine().values()), x.shape[1])
        axis = 1 if x.shape[1] == size else -1
    return x.detach().movedim(axis, 1)


def record(norms: Iterable[Norm], model: nn.Module, items: Iterable[Any], call: Callable[[Any], Any]) -> Record:
    """Run `call` on each item in training mode, and record. Buffers change; the caller restores them.

    A batch that a layer refuses since it has one value per channel is skipped and noted.
    """
    recorder = Recorder(model, norms)
    with in_training(model), recorder.hooked(), torch.no_grad():
        for item in items:
            recorder.begin()
            try:
                call(item)
            except ValueError:
                if not recorder.refused():
                    raise
                recorder.record.refused.add(recorder.record.batches)
            recorder.end()
    return recorder.finished()


class Recorder:
    """Records what happens between `begin` and `end`, of each batch, in forwards of a model in training mode.

    Args:
        model: that runs.
        norms: its layers.
        sources: whether to find out who feeds the layers.
    """

    def __init__(self, model: nn.Module, norms: Iterable[Norm], *, sources: bool = True) -> None:
        self._model, self._norms, self.record = model, list(norms), Record()
        self._linear = [
            (name, module)
            for name, module in model.named_modules()
            if sources and isinstance(module, (nn.Linear, _ConvNd))
        ]
        self._outputs = dict[int, tuple[weakref.ref[Tensor], str]]()
        self._numbers = dict[str, int]()
        self._calls = dict[str, list[Batch]]()
        self._last: LayerRecord | None = None
        self._alone_now = False  # whether the last call had one value per channel

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks at the layers."""
        with contextlib.ExitStack() as stack:
            for norm in self._norms:
                stack.callback(
                    norm.module.register_forward_pre_hook(self._before(norm), prepend=True, with_kwargs=True).remove
                )
                stack.callback(norm.module.register_forward_hook(self._checked(norm), with_kwargs=True).remove)
                stack.callback(norm.module.register_forward_hook(self._alone(norm)).remove)
            for name, module in self._linear:
                stack.callback(module.register_forward_hook(self._after(name)).remove)
            yield

    def begin(self) -> None:
        """A batch begins."""
        self._numbers.clear()
        self._outputs.clear()
        self._calls.clear()
        self._last = None

    @property
    def is_empty(self) -> bool:
        """Whether no layer was called since `begin`."""
        return self._last is None

    def refused(self) -> bool:
        """Whether the layer that was called last had one value per channel."""
        return self._last is not None and self._last.single > 0

    def end(self) -> None:
        """Merge the calls of the batch."""
        self.record.batches += 1
        for name, calls in self._calls.items():
            domains = dict.fromkeys(call.domain for call in calls)
            self.record.layers[name].batches.extend(
                _merged([call for call in calls if call.domain == domain]) for domain in domains
            )

    def finished(self) -> Record:
        """The record, with the pools of all calls."""
        for layer in self.record.layers.values():
            if layer.calls:
                layer.pool = functools.reduce(Moments.merge, layer.calls.values())
        return self.record

    def _after(self, name: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs[id(output)] = (weakref.ref(output), name)

        return after

    def _before(self, norm: Norm) -> Callable[..., None]:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if graph_task() != -1 or not self._model.training:  # a checkpoint computes again, or somebody validates
                return
            x = input_of(norm, args, kwargs)
            if x is None or x.numel() == 0:
                return
            layers = self.record.layers
            found = layers.get(norm.name)
            if found is None:
                trained = layer.training and not norm.frozen
                found = layers[norm.name] = LayerRecord(norm, len(layers), trained)
            self._last, self._alone_now = found, False
            given = args[0] if args else kwargs.get("input")
            reference, source = self._outputs.get(id(given), (None, None))
            source = source if reference is not None and reference() is given else None
            found.source = source if found.source in ("", source) else None
            with disabled_torch_function():
                self._count(found, x, _mask(norm, x, args, kwargs))

        return before

    def _alone(self, norm: Norm) -> Callable[..., None]:
        """A hook that notes what a layer returns for one value per channel, if it does not raise."""

        def after(_layer: nn.Module, _args: Any, output: Any) -> None:
            if self._alone_now and self._last is not None and self._last.norm is norm:
                self._last.single_output = _output_of_one(norm, output)

        return after

    def _checked(self, norm: Norm) -> Callable[..., None]:
        """A hook that compares the output of torch's kernel for channels_last with exact numbers, where the mean is large."""

        def after(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found, x = self._last, input_of(norm, args, kwargs)
            if found is None or found.norm is not norm or not found.trained or found.kernel_error or x is None:
                return
            if norm.kind != "torch" or x.dim() < 4 or x.is_contiguous() or not isinstance(output, Tensor):
                return
            batch = found.calls.get((norm.domain, self._numbers.get(norm.name, -1)))
            if batch is None or bool((batch.mean.square() < _LARGE_MEAN**2 * batch.variance()).all()):
                return
            pair = moments(x)
            shape = (1, -1) + (1,) * (x.dim() - 2)
            mean, var = pair.mean.double().view(shape), pair.variance().double().view(shape)
            exact = (x.double() - mean) * (var + (norm.eps or 0)).rsqrt()
            affine = {role: value.detach().double().view(shape) for role, value in norm.affine().items()}
            weight, bias = affine.get("weight", 1.0), affine.get("bias", 0.0)
            error = (output.detach().double() - (exact * weight + bias)).abs().max()
            found.kernel_error = float(error / (weight.abs().max() if isinstance(weight, Tensor) else 1.0))

        return after

    def _count(self, found: LayerRecord, x: Tensor, mask: Tensor | None) -> None:
        """Add one call's input (N, C, *S)."""
        name = found.norm.name
        number = self._numbers[name] = self._numbers.get(name, -1) + 1
        if x.numel() == x.shape[1] and found.trained:
            found.single, self._alone_now = len(x), True
            return
        batch = moments(x, mask)
        count, mean, m2 = float(batch.count), batch.mean.double(), batch.m2.double()
        if count < 1:
            return
        if not bool((mean.isfinite() & m2.isfinite()).all()):
            found.nonfinite += 1
            self.record.nonfinite.add(self.record.batches)
            return
        var = m2 / count
        moments_here = Moments(int(count), mean, m2)
        domain = found.norm.domain
        before = found.calls.get((domain, number))
        found.calls[domain, number] = moments_here if before is None else before.merge(moments_here)
        means = x.flatten(2).mean(2, dtype=torch.float64) if x.dim() > 2 else x.double()  # (N, C)
        center = means.mean(0)
        spread = (means - center).square().sum(0)
        self._calls.setdefault(name, []).append(Batch(len(x), count, mean, var, center, spread, domain))
        found.precision = max(found.precision, torch.finfo(x.dtype).eps)
        if mask is None and x.dim() > 2 and self.record.batches < PADDED_BATCHES:
            found.padding = max(found.padding, _padding(x))


def _output_of_one(norm: Norm, output: Any) -> SingleOutput:
    """What a layer returned for one value per channel."""
    if not isinstance(output, Tensor):
        return "value"
    if not bool(output.isfinite().all()):
        return "NaN"
    bias = norm.affine().get("bias")
    expected = torch.zeros((), device=output.device) if bias is None else bias.detach().flatten()
    is_bias = output.numel() % expected.numel() == 0 and torch.allclose(
        output.detach().double().reshape(-1, expected.numel()), expected.double(), atol=1e-6
    )
    return "bias" if is_bias else "value"


def _mask(norm: Norm, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask of a call of our layers, by mask or lengths."""
    if norm.kind != "ours":
        return None
    mask = args[2] if len(args) > 2 else kwargs.get("mask")
    lengths = args[3] if len(args) > 3 else kwargs.get("lengths")
    return mask_of(lengths, mask, x)


def _merged(calls: list[Batch]) -> Batch:
    first = calls[0]
    if len(calls) == 1:
        return first
    pool = functools.reduce(
        Moments.merge, (Moments(int(each.count), each.mean, each.var * each.count) for each in calls)
    )
    return replace(first, count=float(pool.count), mean=pool.mean, var=pool.variance())


def _padding(x: Tensor) -> float:
    """Share of the values (N, C, *S) in constant tails beyond the shortest one, along the worst axis.

    The same share at the beginning is subtracted, since borders of images are constant on both sides.
    """
    worst = 0.0
    for axis in range(2, x.dim()):
        lines = x.movedim(axis, -1)  # (N, C, ..., T)
        T = lines.shape[-1]
        if T < 4 or len(lines) < 2:
            continue
        ends = [lines.flip(-1), lines]
        tail, head = (_constant(end) for end in ends)
        worst = max(worst, float((tail - tail.min()).double().mean() - (head - head.min()).double().mean()) / T)
    return worst


def _constant(lines: Tensor) -> Tensor:
    """For each sample, at how many places from the start all values equal the first ones, (N,)."""
    same = (lines == lines[..., :1]).flatten(1, -2).all(1)  # (N, T)
    return same.int().cumprod(1).sum(1)
