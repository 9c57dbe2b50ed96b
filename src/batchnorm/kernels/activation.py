"""The activations that a kernel applies in the same pass: y = activation(affine(x̂) + residual)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.errors import InputError

NAMES = ("relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu")

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative, both of the pre-activation z.

    Attributes:
        name: one of `NAMES`, or "gelu_tanh".
        negative_slope: the slope below zero, of "leaky_relu" only.
    """

    name: str
    negative_slope: float = 0.01

    def __call__(self, z: Tensor) -> Tensor:
        if self.name == "leaky_relu":
            return F.leaky_relu(z, self.negative_slope)
        return _FORWARD[self.name](z)

    def derivative(self, z: Tensor) -> Tensor:
        """d activation / dz, of z's shape and dtype. At a kink it is torch's choice."""
        match self.name:
            case "relu":
                return (~(z <= 0)).to(z.dtype)
            case "relu6":
                return (~((z <= 0) | (z >= 6))).to(z.dtype)
            case "leaky_relu":
                return torch.full_like(z, self.negative_slope).masked_fill_(z > 0, 1.0)
            case "silu":
                sigmoid = z.sigmoid()
                return sigmoid * (1 + z * (1 - sigmoid))
            case "hardswish":
                return torch.where(z <= -3, 0.0, torch.where(z < 3, z / 3 + 0.5, 1.0))
            case "gelu":
                density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
                return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
            case _:  # gelu_tanh: 0.5 z (1 + tanh u), u = sqrt(2/pi) (z + 0.044715 z^3)
                scale = math.sqrt(2 / math.pi)
                tanh = torch.tanh(scale * (z + 0.044715 * z**3))
                slope = scale * (1 + 3 * 0.044715 * z.square())
                return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh.square()) * slope

    @property
    def derivative_from_output(self) -> bool:
        """Whether the derivative at z is the derivative at y: no kink is crossed between them."""
        # relu6 has one: z just below 6 may be rounded to a y of 6.
        return self.name == "relu" or (self.name == "leaky_relu" and self.negative_slope > 0)

    def __str__(self) -> str:
        return f"leaky_relu({self.negative_slope:g})" if self.name == "leaky_relu" else self.name


def parse(activation: str | nn.Module | Activation | None) -> Activation | None:
    """The `Activation` a user means by a name or by torch's module of it; None for none.

    Raises:
        InputError: if the name or the module is not one of ours.
    """
    if activation is None or isinstance(activation, Activation):
        return activation
    if isinstance(activation, str) and activation in NAMES:
        return Activation(activation)
    found = from_module(activation) if isinstance(activation, nn.Module) else None
    if found is not None:
        return found
    raise InputError(
        f"activation must be None, one of {', '.join(map(repr, NAMES))}, or torch's module of one of them, but got "
        f"{activation!r}; apply any other activation after the layer"
    )


def from_module(module: nn.Module) -> Activation | None:
    """The `Activation` equal to torch's module; None where there is none. A subclass may compute anything, so it is none."""
    if type(module) is nn.LeakyReLU:
        return Activation("leaky_relu", module.negative_slope)
    if type(module) is nn.GELU:
        return Activation("gelu" if module.approximate == "none" else "gelu_tanh")
    names: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}
    name = names.get(type(module))
    return None if name is None else Activation(name)
