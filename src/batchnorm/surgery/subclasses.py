"""Subclasses of torch's batch norms (timm's `BatchNormAct2d`, parametrized ones, those of FSDP2 ...) converted to ours, and back.

If a class does not override torch's forward, or its forward computes "batch norm, then its submodules" or "batch norm, then an activation",
its layers get a class derived from ours and from it: `isinstance` still holds, and its other methods stay. Running a copy on random numbers
shows what a forward computes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from batchnorm.kernels import Activation
from batchnorm.kernels.activation import WITHOUT_SLOPE
from batchnorm.layers import BatchNorm, with_signature_of
from batchnorm.surgery.classes import like, remade
from batchnorm.surgery.walker import is_watched

_TORCHS_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_OVERRIDING = ("_check_input_dim", "reset_parameters")  # methods of a subclass that replace ours
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Rest(NamedTuple):
    """What a layer does after it normalizes: it calls its children, or applies an activation.

    Attributes:
        children: the names of submodules that it calls one after the other.
        activation: the activation that it applies, or None.
    """

    children: tuple[str, ...] = ()
    activation: Activation | None = None


class WithRest(BatchNorm):
    """A layer that calls submodules after it normalizes; `rest` names them."""

    rest: tuple[str, ...] = ()

    @with_signature_of(BatchNorm.forward)
    def forward(self, input: Tensor, *given: Any, **named: Any) -> Tensor:
        """Normalize, and call the submodules."""
        y = super().forward(input, *given, **named)
        if isinstance(input, fx.Proxy):  # one node stands for the layer with its submodules
            return y
        for name in self.rest:
            y = getattr(self, name)(y)
        return y


def derived(ours: type[BatchNorm], base: type[nn.Module], rest: Rest) -> type[BatchNorm]:
    """Our class for layers of the class `base`."""
    cls: Any = _derived(ours, base, *rest)
    return cls


@remade
def _derived(
    ours: type[BatchNorm], base: type[nn.Module], children: tuple[str, ...], activation: Activation | None
) -> type[nn.Module]:
    bases: list[type] = [WithRest] if children else []
    bases.append(ours)
    # code such as DDP on the CPU checks for torch's SyncBatchNorm because of its limits, which ours does not have
    if issubclass(base, _BatchNorm) and not issubclass(base, nn.SyncBatchNorm):
        bases.append(base)
    own: dict[str, Any] = {**like(base), "class_before": base, "rest": children}
    if activation is not None:
        own["activation"] = activation
    for name in _OVERRIDING:
        method = getattr(base, name, None)
        if method is not None and not getattr(method, "__module__", "").startswith("torch."):
            own[name] = method
    cls: Any = type(base.__name__, tuple(bases), own)
    return cls


def class_before(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class for which `derived` created this one; None for other classes."""
    return vars(cls).get("class_before")


def does_more(layer: BatchNorm) -> bool:
    """Whether a layer calls something after it normalizes; an identity counts only with hooks."""
    return isinstance(layer, WithRest) and any(
        type(child := getattr(layer, name)) is not nn.Identity or is_watched(child) for name in layer.rest
    )


def mapped(cls: type[nn.Module], target: Callable[[type[nn.Module]], type[nn.Module]]) -> type[nn.Module]:
    """`target(cls)`; if torch created the class around another one (parametrizations, FSDP2), the same around the target of that."""
    inner = wrapped(cls)
    if inner is None:
        return target(cls)
    found = mapped(inner, target)
    before = vars(cls).get("_wrapper_before")
    if before is not None and wrapped(before) is found and set(vars(before)) == set(vars(cls)) - {"_wrapper_before"}:
        return before
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    bases = tuple(found if base is inner else base for base in cls.__bases__)
    made: Any = type(cls.__name__, bases, {**own, "_wrapper_before": cls})
    return made


def wrapped(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class around which torch created this one for a single module, or None."""
    made_there = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is not cls
    if not cls.__module__.startswith("torch.") or not made_there:
        return None
    return next((base for base in cls.__bases__ if issubclass(base, _NormBase)), None)


def rest_of_layer(layer: nn.Module, plain: Callable[[Any, Tensor], Tensor] = _BatchNorm.forward) -> Rest | str:
    """What a layer does after `plain`; if that cannot be recognized, the reason."""
    cls = type(layer)
    if plain is _BatchNorm.forward and cls.forward in _TORCHS_FORWARDS:
        return Rest()
    if len(inspect.signature(cls.forward).parameters) != 2:
        return f"it is a {cls.__name__}, whose forward takes more than the input"
    names = tuple(name for name, _ in layer.named_children() if name != "parametrizations")
    try:
        with _without_side_effects(), torch.no_grad():
            twin, other = _probed(layer), _probed(layer)
            runs = list[tuple[bool, Any, Tensor]]()
            for training, x in itertools.product((True, False), _probes(twin)):
                twin.train(training)
                other.train(training)
                runs.append((training, _seeded(twin.forward, x.clone()), _seeded(plain, other, x.clone())))
            alike = all(_same(a, b) for a, b in zip(twin.buffers(), other.buffers(), strict=True))
            for rest in _candidates(names, *runs[-1][1:]) if alike else ():
                if all(
                    _same(found, _seeded(_applied, other.train(training), rest, z.clone()))
                    for training, found, z in runs
                ):
                    return rest
    except Exception as error:  # its forward or its copy may raise anything
        return f"it is a {cls.__name__}, which computes something else ({type(error).__name__})"
    return f"it is a {cls.__name__}, which computes something else"


def _probed(layer: nn.Module) -> Any:
    """A copy on the CPU in float64, without hooks, with random weights and statistics, since initial ones hide differences."""
    written = {id(value): value.detach().clone() for value in vars(layer).values() if isinstance(value, Tensor)}
    twin = copy.deepcopy(layer, written)
    if any(value.is_meta for value in (*twin.parameters(), *twin.buffers())):
        twin = twin.to_empty(device="cpu")
        for value in (*twin.parameters(), *twin.buffers()):
            value.zero_()
    twin = twin.cpu().double()
    for module in twin.modules():
        for name in _HOOKS:
            getattr(module, name).clear()
    generator = torch.Generator().manual_seed(0)
    ranges = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5), "running_mean": (-1.0, 1.0), "running_var": (0.5, 2.0)}
    for tensors in (twin._parameters, twin._buffers):
        for name, value in tensors.items():
            if value is not None and name in ranges:
                low, high = ranges[name]
                value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) * (high - low) + low)
    return twin


def _probes(layer: Any) -> list[Tensor]:
    """Inputs of each rank that a layer accepts; large values identify activations that are bounded."""
    ranks = {nn.BatchNorm1d: ((), (6,)), nn.BatchNorm3d: ((2, 3, 2),)}
    spatial = next((sizes for cls, sizes in ranks.items() if isinstance(layer, cls)), ((2, 3),))
    C = layer.num_features if layer.running_mean is None else layer.running_mean.numel()
    generator = torch.Generator().manual_seed(1)
    probes = list[Tensor]()
    for sizes in spatial:
        x = torch.randn(4, C, *sizes, dtype=torch.float64, generator=generator)
        x[0] += 20
        x[1] -= 20
        probes.append(x)
    return probes


def _candidates(names: tuple[str, ...], found: Tensor, z: Tensor) -> Iterator[Rest]:
    """Candidates for what turns a normalized `z` into `found`."""
    if names:
        yield Rest(names)
    yield Rest()
    yield from (Rest((), activation) for activation in WITHOUT_SLOPE.values())
    slope = round((found[z < 0] / z[z < 0]).median().item(), 9)
    if 0 < slope < 1:
        yield Rest((), Activation("leaky_relu", slope))


def _seeded(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, always with the same random numbers."""
    random.seed(0)
    torch.default_generator.manual_seed(0)
    return function(*args)


def _applied(layer: nn.Module, rest: Rest, z: Tensor) -> Tensor:
    for name in rest.children:
        z = layer.get_submodule(name)(z)
    return z if rest.activation is None else rest.activation(z)


def _same(found: Any, wanted: Tensor) -> bool:
    return (
        isinstance(found, Tensor)
        and found.shape == wanted.shape
        and torch.allclose(found.double(), wanted.double(), rtol=1e-8, atol=1e-8)
    )


@contextlib.contextmanager
def _without_side_effects() -> Iterator[None]:
    """Restore the generators of random numbers afterwards, and ignore warnings."""
    states = random.getstate(), torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
