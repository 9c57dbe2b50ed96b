"""Normalizations that torch has not, for (N, C, *S): by the root mean square, and dynamic tanh. Each has a scale and a shift by channel."""

import torch
from torch import Tensor, nn


class _Scaled(nn.Module):
    """The scale and the shift of each channel, (C,)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def scaled(self, z: Tensor) -> Tensor:
        shape = (-1, *[1] * (z.dim() - 2))
        return z * self.weight.view(shape) + self.bias.view(shape)


class RootMeanSquareNorm(_Scaled):
    """x / √(mean(x²) + ε) over all values of a sample (Zhang & Sennrich 2019, arXiv:1910.07467, equation 4)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.square().flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1))  # (N, 1, ...)
        return self.scaled(x * torch.rsqrt(mean_square + self.eps))


class DynamicTanh(_Scaled):
    """tanh(αx) with one learned α for the layer, 0.5 at first (Zhu et al. 2025, arXiv:2503.10622, equation 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(torch.tanh(self.alpha * x))
