"""Folds an affine function into the weights of the linear layer before or after it.

scale · (W ∗ x + b) + shift = (scale · W) ∗ x + (scale · b + shift)                     after
W ∗ (scale · x + shift) + b = (W · scale) ∗ x + (b + W ∗ shift)                         before
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.folding.norms import Affine
from batchnorm.surgery.walker import is_watched

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEAR = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The class in `LINEAR` whose forward a module runs, or None."""
    for cls in LINEAR:
        own = [
            name for name in ("forward", "_conv_forward") if getattr(type(module), name, 0) is not getattr(cls, name, 0)
        ]
        if isinstance(module, cls) and not own:
            return cls
    return None


def can_fold_after(module: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether an affine function after a linear layer's subclass, which has its own forward, can be folded into its weights.

    The forward may change its input, by padding for example, but must be linear in its weights. To test this, the function folds a random
    affine function into a float64 copy, and compares outputs for an input of this shape.
    """
    if not isinstance(module, LINEAR) or not_writable(module) is not None:
        return False
    try:
        twin: Any = copy.deepcopy(module).double()
        generator = torch.Generator().manual_seed(0)
        C = twin.out_features if isinstance(twin, nn.Linear) else twin.out_channels
        x, *numbers = (torch.rand(size, generator=generator).to(twin.weight) for size in ((1, *shape[1:]), C, C))
        affine = Affine(numbers[0] + 0.5, numbers[1] - 0.5)
        with torch.no_grad():
            wanted = affine(twin.forward(x - 0.5), channel_axis(twin, len(shape)))
            weights = Weights(twin)
            weights.fold_after(affine)
            weights.write()
            found = twin.forward(x - 0.5)
    except Exception:  # its forward or its copy may raise anything
        return False
    return found.shape == wanted.shape and torch.allclose(found, wanted, 1e-9, 1e-9)


def not_writable(module: nn.Module) -> str | None:
    """Why the weights of a linear layer cannot be set, or None."""
    if is_watched(module):
        return "it has hooks or a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is parametrized"
    if "bias" not in module._parameters:
        return "its bias is parametrized"
    return None if weight.is_floating_point() else "its weight is not of a floating dtype"


def channel_axis(module: nn.Module, rank: int) -> int:
    """The channel axis of a linear layer's input and output."""
    return rank - 1 if isinstance(module, nn.Linear) else rank - 1 - (module.weight.dim() - 2)  # pyright: ignore


def along_outputs(values: Tensor, module: Any) -> Tensor:
    """One value for each output channel, (C,), reshaped so that it broadcasts to the weight of a linear layer."""
    weight = module.weight
    if isinstance(module, TRANSPOSED):  # (inputs, outputs / groups, *kernel)
        values = values.reshape(module.groups, 1, -1).expand(-1, weight.shape[0] // module.groups, -1).flatten(0, 1)
    return _spread(values, weight)  # otherwise (outputs, inputs / groups, *kernel)


class Weights:
    """The weights of one linear layer in float64; `write` casts them back once, after all folds."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.weight: Tensor = module.weight.detach().double()
        self.bias: Tensor | None = None if module.bias is None else module.bias.detach().double()
        self.groups: int = getattr(module, "groups", 1)
        self.transposed = isinstance(module, TRANSPOSED)

    def fold_after(self, affine: Affine) -> None:
        """Fold an affine function after the layer into the weights."""
        self.weight = self.weight * along_outputs(affine.scale, self.module)
        self.bias = affine.shift if self.bias is None else self.bias * affine.scale + affine.shift

    def fold_before(self, affine: Affine) -> None:
        """Fold an affine function before the layer into the weights; for transposed layers, the shift must be 0."""
        if self.transposed:
            self.weight = self.weight * _spread(affine.scale, self.weight)
            return
        by_group = self.weight.unflatten(0, (self.groups, -1))  # (groups, outputs / groups, inputs / groups, *kernel)
        shift = (by_group * _spread(affine.shift.view(self.groups, 1, -1), by_group)).flatten(0, 1).flatten(1).sum(1)
        self.weight = (by_group * _spread(affine.scale.view(self.groups, 1, -1), by_group)).flatten(0, 1)
        self.bias = shift if self.bias is None else self.bias + shift

    def add_branch(self, other: Weights, offsets: tuple[int, ...]) -> None:
        """Add a parallel convolution with the same groups, whose kernel starts at these offsets in this one's kernel."""
        weight = self.weight.clone()
        kernel = tuple(slice(at, at + size) for at, size in zip(offsets, other.weight.shape[2:], strict=True))
        weight[(..., *kernel)] += other.weight
        self.weight = weight
        if other.bias is not None:
            self.bias = other.bias if self.bias is None else self.bias + other.bias

    def write(self) -> None:
        """Set the weights of the layer, as new parameters."""
        before = self.module.weight
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if value is not None:
                # with the memory format of the old weights
                value = value.to(before.dtype) if name == "bias" else torch.empty_like(before).copy_(value)
                setattr(self.module, name, nn.Parameter(value, before.requires_grad))


def _spread(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(*values.shape, *(1,) * (like.dim() - values.dim()))
