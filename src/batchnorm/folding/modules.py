"""Modules that replace folded batch norms."""

from __future__ import annotations

from torch import Tensor, nn

from batchnorm.kernels import Activation


class Rest(nn.Module):
    """The remaining operations of a folded batch norm: add the residual, apply the activation, call its submodules."""

    def __init__(self, activation: Activation | None, *children: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.then = nn.Sequential(*children) if children else None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(input + residual), any shape."""
        z = input if residual is None else input + residual
        z = z if self.activation is None else self.activation(z)
        return z if self.then is None else self.then(z)

    def extra_repr(self) -> str:
        """The activation."""
        return str(self.activation)


class ChannelPad(nn.Module):
    """Padding with one value per channel, chosen so that the folded batch norm would return 0 at the border.

    Args:
        value: (C,).
        padding: as for `torch.nn.functional.pad`: (left, right) of the last axis, then of the one before ...

    Shape:
        input (N, C, *S) or (C, *S), with len(padding) / 2 axes S; output the same, with the axes S padded.
    """

    value: Tensor

    def __init__(self, value: Tensor, padding: tuple[int, ...]) -> None:
        super().__init__()
        self.padding = padding
        self.register_buffer("value", value)

    def forward(self, input: Tensor) -> Tensor:
        """Pad."""
        spatial = len(self.padding) // 2
        before, after = self.padding[::2][::-1], self.padding[1::2][::-1]  # of each axis of S
        inner = input.shape[-spatial:]
        outer = [size + left + right for size, left, right in zip(inner, before, after, strict=True)]
        value = self.value.to(input.dtype).reshape(-1, *(1,) * spatial)
        output = value.expand(*input.shape[:-spatial], *outer).clone()
        inside = output
        for axis, left, size in zip(range(-spatial, 0), before, inner, strict=True):
            inside = inside.narrow(axis, left, size)
        inside.copy_(input)
        return output

    def extra_repr(self) -> str:
        """Number of channels, and padding."""
        return f"{self.value.numel()}, padding={self.padding}"
