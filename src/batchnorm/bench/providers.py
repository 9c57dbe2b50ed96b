"""The implementations to compare. Each refuses cases that it cannot compute, and returns a function to time for the others."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FunctionType
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F

from batchnorm import functional
from batchnorm.bench.case import Case, Tensors
from batchnorm.errors import InputError
from batchnorm.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.statistics import Batch, Ghost, Renorm, Statistics

Call = Callable[..., Tensor]  # x, and the residual if there is one -> y
Timed = Callable[[], tuple[Tensor, ...]]  # returns y alone, or the gradients, dx first


class Provider(Protocol):
    """An implementation of batch normalization."""

    name: str

    def refuses(self, case: Case) -> str | None:
        """Why it cannot compute the case, or None."""
        ...

    def prepare(self, case: Case, given: Tensors) -> Timed:
        """The function to time, to run under `torch.set_grad_enabled(case.needs_grad)`."""
        ...


class Copy:
    """A copy in reused memory that reads and writes as many bytes as the case's tensors have: the byte limit.

    The number of bytes must be the same, because it decides how many of them are in the cache.
    """

    name = "copy"

    def refuses(self, case: Case) -> str | None:  # noqa: ARG002 (the protocol's signature)
        return None

    def prepare(self, case: Case, given: Tensors) -> Timed:
        values = given.x.numel() * case.tensors // 2
        source = torch.ones(values, dtype=given.x.dtype, device=given.x.device)
        target = source.clone()
        return lambda: (target.copy_(source),)


class Eager:
    """Plain torch, with residual and activation in place if autograd allows."""

    def __init__(self, name: str = "eager") -> None:
        self.name = name

    def refuses(self, case: Case) -> str | None:  # noqa: ARG002 (the protocol's signature)
        return None

    def prepare(self, case: Case, given: Tensors) -> Timed:
        return _directed(case, given, *_torchs(case, given))


class Compile:
    """`torch.compile` of torch's batch norm or of ours, compiled for each shape, within a function as in a model.

    A module of ours compiled by itself is called through two frames that one of torch's is not.
    """

    def __init__(self, name: str, ours: bool) -> None:
        self.name, self.ours = name, ours

    def refuses(self, case: Case) -> str | None:
        if case.through == "replicas":
            return "compiled layers are not measured over replicas"
        if case.device != "cpu":
            return None if importlib.util.find_spec("triton") else "torch.compile needs Triton on a GPU"
        return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "torch.compile needs a C++ compiler"

    def prepare(self, case: Case, given: Tensors) -> Timed:
        from torch._inductor import config as inductor_config

        call, parameters = (_ours if self.ours else _torchs)(case, given)
        # The backward runs more than once, so it must not reuse the memory of saved tensors, as one from the cache might.
        # The cache of graphs does not know ATEN_CPU_CAPABILITY: code for vectors of AVX-512 ran over the ends of arrays with those of AVX2.
        alone = functorch_config.patch(donated_buffer=False, enable_autograd_cache=False)
        with alone, inductor_config.patch(fx_graph_cache=False):
            timed = _directed(case, given, torch.compile(_within_function(call), dynamic=False), parameters)
            timed()
        return timed


def _within_function(call: Call) -> Call:
    """A function that calls it. Its code is no other function's: all that is compiled of a code object is checked in turn."""

    def function(*inputs: Tensor) -> Tensor:
        return call(*inputs)

    return FunctionType(function.__code__.replace(), function.__globals__, "function", None, function.__closure__)


class OneDNN:
    """oneDNN's batch norm on `to_mkldnn` tensors."""

    name = "onednn"

    def refuses(self, case: Case) -> str | None:
        if not torch.backends.mkldnn.is_available():
            return "torch is built without oneDNN"
        if case.through == "layer":
            return "layers are compared with torch's only"
        if case.device != "cpu":
            return "oneDNN is for the CPU"
        if case.dtype != "float32" or case.layout != "planar" or len(case.layer.shape) < 4:
            return "to_mkldnn normalizes float32 of 4 or 5 axes, contiguous"
        return None if case.layer.activation in (None, "relu") else f"to_mkldnn has no {case.layer.activation}"

    def prepare(self, case: Case, given: Tensors) -> Timed:
        weight, bias, mean, variance = _parameters(case, given)
        training = case.direction != "inference"

        def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = torch.batch_norm(x, weight, bias, mean, variance, training, 0.1, 1e-5, False)
            y = y if residual is None else y + residual
            return y if case.layer.activation is None else torch.relu(y)

        residual = None if given.residual is None else given.residual.to_mkldnn()
        blocked = replace(given, x=given.x.to_mkldnn(), dy=given.dy.to_mkldnn(), residual=residual)
        return _directed(case, blocked, call, (weight, bias))


class Ours:
    """Our function or layer, with the kernel that accepts the case."""

    name = "ours"

    def refuses(self, case: Case) -> str | None:  # noqa: ARG002 (the protocol's signature)
        return None

    def prepare(self, case: Case, given: Tensors) -> Timed:
        return _directed(case, given, *_ours(case, given))


class WithSource:
    """Our layer with another statistics source or a mask; shows its extra cost over "ours"."""

    def __init__(self, name: str, statistics: Callable[[Case], Statistics], masked: bool = False) -> None:
        self.name, self.statistics, self.masked = name, statistics, masked

    def refuses(self, case: Case) -> str | None:
        return "in inference all statistics sources are the same" if case.direction == "inference" else None

    def prepare(self, case: Case, given: Tensors) -> Timed:
        activation = case.layer.activation
        layer = _filled(
            BatchNorm(case.layer.shape[1], activation=activation, statistics=self.statistics(case)), case, given
        )
        mask = _padding(case).to(given.x.device) if self.masked else None
        return _directed(case, given, lambda *inputs: layer(*inputs, mask=mask), tuple(layer.parameters()))


def _padding(case: Case) -> Tensor:
    """A mask (N, *S) that selects the first 60% to 100% of the positions of each sample."""
    N, _, *S = case.layer.shape
    positions = math.prod(S)
    lengths = torch.linspace(0.6 * positions, positions, N).long()
    return (torch.arange(positions) < lengths.unsqueeze(1)).view(N, *S)


PROVIDERS: tuple[Provider, ...] = (
    Copy(),
    Eager(),
    Eager("eager again"),  # the same as another instance, as "compile again": how much a ratio can tell
    Compile("compile", ours=False),
    Compile("compile again", ours=False),
    OneDNN(),
    Ours(),
    Compile("compile ours", ours=True),
)
SOURCES: tuple[Provider, ...] = (  # they compute something else, so their rows have no error
    WithSource("ghost", lambda case: Ghost(min(16, max(case.layer.shape[0] // 2, 2)))),
    WithSource("renorm", lambda _: Renorm(warmup=0)),
    WithSource("mask", lambda _: Batch(), masked=True),
)
USUAL = ("copy", "eager", "onednn", "ours")  # compiling takes ten seconds per case


def find(names: Sequence[str]) -> list[Provider]:
    """The providers with these names, with copy and eager, which all are compared to.

    Raises:
        InputError: on a name that is not in `PROVIDERS` or `SOURCES`.
    """
    known = [provider.name for provider in (*PROVIDERS, *SOURCES)]
    for name in names:
        if name not in known:
            raise InputError(f"provider must be one of {', '.join(known)}, but got {name!r}")
    return [provider for provider in (*PROVIDERS, *SOURCES) if provider.name in (*names, "copy", "eager")]


def layer_of_ours(case: Case, given: Tensors) -> BatchNorm:
    """Our layer, with the case's parameters and statistics."""
    ours = (BatchNorm1d, BatchNorm2d, BatchNorm3d)[max(len(case.layer.shape) - 3, 0)]
    return _filled(ours(case.layer.shape[1], activation=case.layer.activation), case, given)


def timed_layer(case: Case, given: Tensors, layer: nn.Module) -> Timed:
    """The function to time for a layer."""
    return _directed(case, given, layer, tuple(layer.parameters()))


def _ours(case: Case, given: Tensors) -> tuple[Call, tuple[Tensor, ...]]:
    """Our batch norm, and its parameters."""
    if case.through == "layer":
        layer = layer_of_ours(case, given)
        return layer, tuple(layer.parameters())
    activation = case.layer.activation
    weight, bias, mean, variance = _parameters(case, given)
    training = case.direction != "inference"

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return functional.batch_norm(
            x, mean, variance, weight, bias, training, activation=activation, residual=residual
        )

    return call, (weight, bias)


def _torchs(case: Case, given: Tensors) -> tuple[Call, tuple[Tensor, ...]]:
    """Torch's batch norm with residual and activation, and its parameters."""
    if case.through == "layer":
        torchs = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[max(len(case.layer.shape) - 3, 0)]
        normalize = _filled(torchs(case.layer.shape[1]), case, given)
        parameters = (normalize.weight, normalize.bias)
    else:
        weight, bias, mean, variance = _parameters(case, given)
        parameters, training = (weight, bias), case.direction != "inference"

        def normalize(x: Tensor) -> Tensor:
            return F.batch_norm(x, mean, variance, weight, bias, training)

    activate = _in_place(case.layer.activation)
    if activate is None and not case.layer.residual:
        return normalize, parameters  # for tiny tensors calls dominate the time, so add none

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = normalize(x)
        if residual is not None:
            y += residual
        return y if activate is None else activate(y)

    return call, parameters


def _in_place(activation: str | None) -> Callable[[Tensor], Tensor] | None:
    """The activation in place, as in torchvision's networks; GELU has no such variant."""
    if activation is None or activation == "gelu":
        return None if activation is None else F.gelu
    function = getattr(F, activation)
    return lambda y: function(y, inplace=True)


def _parameters(case: Case, given: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies of weight, bias and running statistics, which the provider may update."""
    weight, bias = (value.clone().requires_grad_(case.needs_grad) for value in (given.weight, given.bias))
    return weight, bias, given.mean.clone(), given.variance.clone()


_Layer = TypeVar("_Layer", bound=nn.modules.batchnorm._BatchNorm)


def _filled(layer: _Layer, case: Case, given: Tensors) -> _Layer:
    """A layer with the case's parameters and statistics."""
    state = {"weight": given.weight, "bias": given.bias, "running_mean": given.mean, "running_var": given.variance}
    layer.load_state_dict(state, strict=False)
    layer.to(given.x.device)
    return layer.train(case.direction != "inference")


def _directed(case: Case, given: Tensors, call: Call, parameters: tuple[Tensor, ...]) -> Timed:
    """The function that runs the direction of the case."""
    arguments = (given.x,) if given.residual is None else (given.x, given.residual)
    if not case.needs_grad:
        return lambda: (call(*arguments),)
    arguments = tuple(value.detach().requires_grad_() for value in arguments)
    if case.direction == "recorded":
        return lambda: (call(*arguments),)
    inputs, dy = (*arguments, *parameters), given.dy
    if case.direction == "step":
        return lambda: torch.autograd.grad(call(*arguments), inputs, dy)
    with torch.enable_grad():
        y = call(*arguments)
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)
