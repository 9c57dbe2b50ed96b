"""The activations that a kernel applies in the same pass: y = activation(affine(x̂) + residual). One row of `ROWS` each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.errors import InputError


class Row(NamedTuple):
    """One activation, an elementwise function of the pre-activation z; a function with a slope takes it as second argument.

    Attributes:
        module: torch's module of it.
        function: its value.
        derivative: d activation / dz, of z's shape and dtype; at a kink it is torch's choice.
        functions: torch's functions of z alone that compute it, in place or not.
        options: attributes of the module that it needs to have these values.
        derivative_from_output: whether the derivative at z is the derivative at y: no kink is crossed between them.
        has_slope: whether it has a slope for negative z.
        in_place: when z may be overwritten: always, if no gradient is recorded ("without gradient"), since the derivative needs z, or
            never, since torch has no such function.
    """

    module: type[nn.Module]
    function: Callable[..., Tensor]
    derivative: Callable[..., Tensor]
    functions: tuple[Callable[..., Tensor], ...] = ()
    options: Mapping[str, Any] = {}
    derivative_from_output: bool = False
    has_slope: bool = False
    in_place: Literal["always", "without gradient", "never"] = "without gradient"


def _silu_derivative(z: Tensor) -> Tensor:
    sigmoid = z.sigmoid()
    return sigmoid * (1 + z * (1 - sigmoid))


def _gelu_derivative(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    """Of 0.5 z (1 + tanh u), u = sqrt(2/π) (z + 0.044715 z³)."""
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (z + 0.044715 * z**3))
    slope = scale * (1 + 3 * 0.044715 * z.square())
    return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh.square()) * slope


ROWS = {
    "relu": Row(
        nn.ReLU,
        F.relu,
        lambda z: (~(z <= 0)).to(z.dtype),
        (F.relu, torch.relu, torch.relu_, F.relu_),
        derivative_from_output=True,
        in_place="always",
    ),
    # relu6 has a kink between z and y: z just below 6 may be rounded to a y of 6.
    "relu6": Row(
        nn.ReLU6,
        F.relu6,
        lambda z: (~((z <= 0) | (z >= 6))).to(z.dtype),
        (F.relu6,),
        in_place="always",
    ),
    "leaky_relu": Row(
        nn.LeakyReLU,
        F.leaky_relu,
        lambda z, slope: torch.full_like(z, slope).masked_fill_(z > 0, 1.0),
        derivative_from_output=True,
        has_slope=True,
        in_place="always",
    ),
    "silu": Row(nn.SiLU, F.silu, _silu_derivative, (F.silu,)),
    "hardswish": Row(
        nn.Hardswish,
        F.hardswish,
        lambda z: torch.where(z <= -3, 0.0, torch.where(z < 3, z / 3 + 0.5, 1.0)),
        (F.hardswish,),
    ),
    "gelu": Row(nn.GELU, F.gelu, _gelu_derivative, options={"approximate": "none"}, in_place="never"),
    "gelu_tanh": Row(
        nn.GELU,
        lambda z: F.gelu(z, approximate="tanh"),
        _gelu_tanh_derivative,
        options={"approximate": "tanh"},
        in_place="never",
    ),
}
NAMES = tuple(name for name in ROWS if name != "gelu_tanh")  # which is said by its module


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative, both of the pre-activation z.

    Attributes:
        name: a key of `ROWS`.
        negative_slope: the slope below zero, of a row with a slope only.
    """

    name: str
    negative_slope: float = 0.01

    def __call__(self, z: Tensor) -> Tensor:
        return ROWS[self.name].function(z, *self._slope)

    def overwriting(self, z: Tensor) -> Tensor:
        """The value, in z's memory where torch's backward allows that; no other graph may hold z."""
        row = ROWS[self.name]
        with_gradient = row.in_place == "always" and self._keeps_signs
        overwrites = with_gradient if z.requires_grad else row.in_place != "never"
        return row.function(z, *self._slope, inplace=True) if overwrites else self(z)

    def derivative(self, z: Tensor) -> Tensor:
        """d activation / dz, of z's shape and dtype. At a kink it is torch's choice."""
        return ROWS[self.name].derivative(z, *self._slope)

    @property
    def has_slope(self) -> bool:
        """Whether it multiplies negative values by `negative_slope`."""
        return ROWS[self.name].has_slope

    @property
    def _slope(self) -> tuple[float, ...]:
        return (self.negative_slope,) if self.has_slope else ()

    @property
    def derivative_from_output(self) -> bool:
        """Whether the derivative at z is the derivative at y: no kink is crossed between them."""
        return ROWS[self.name].derivative_from_output and self._keeps_signs

    @property
    def _keeps_signs(self) -> bool:
        """Whether y is positive just where z is, so that its sign tells which slope was taken."""
        return not self.has_slope or self.negative_slope > 0

    def __str__(self) -> str:
        return f"{self.name}({self.negative_slope:g})" if self.has_slope else self.name


_BY_NAME = {name: Activation(name) for name in ROWS}  # made once: torch 2.11 does not compile code that makes one
WITHOUT_SLOPE = {name: activation for name, activation in _BY_NAME.items() if not activation.has_slope}
OF_FUNCTION: dict[Any, Activation] = {
    function: Activation(name) for name, row in ROWS.items() for function in row.functions
}


def parse(activation: str | nn.Module | Activation | None) -> Activation | None:
    """The `Activation` a user means by a name or by torch's module of it; None for none.

    Raises:
        InputError: if the name or the module is not one of ours.
    """
    if activation is None or isinstance(activation, Activation):
        return activation
    if isinstance(activation, str) and activation in NAMES:
        return _BY_NAME[activation]
    found = from_module(activation) if isinstance(activation, nn.Module) else None
    if found is not None:
        return found
    raise InputError(
        f"activation must be None, one of {', '.join(map(repr, NAMES))}, or torch's module of one of them, but got "
        f"{activation!r}; apply any other activation after the layer"
    )


def from_module(module: nn.Module) -> Activation | None:
    """The `Activation` equal to torch's module; None where there is none. A subclass may compute anything, so it is none."""
    for name, row in ROWS.items():
        if type(module) is row.module and all(getattr(module, key) == value for key, value in row.options.items()):
            return Activation(name, module.negative_slope) if row.has_slope else Activation(name)  # pyright: ignore[reportArgumentType]
    return None
