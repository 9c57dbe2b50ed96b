"""A recognizer of letters: convolutions and recurrent layers for recordings of different lengths (after Amodei et al. 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from batchnorm.lab.data import speech
from batchnorm.layers import BatchNorm1d, BatchNorm2d

HIDDEN = 64
STEPS = 16  # number of time steps with their own statistics in `PerStep`


class Masked(nn.Module):
    """No normalization; sets padding to 0, as normalization does."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return x * (torch.arange(x.shape[-1]) < lengths[:, None]).view(len(x), *[1] * (x.dim() - 2), -1)


class PerStep(nn.Module):
    """Separate statistics for each of the first 16 time steps and for the rest; gamma and beta are shared (Cooijmans et al. 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BatchNorm1d(channels, on_single="running") for _ in range(STEPS + 1))
        for layer in self.layers:
            layer.weight, layer.bias = self.layers[0].weight, self.layers[0].bias

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Normalize (N, C, T); only the first `lengths` steps of each sequence are valid."""
        pieces = [*x[..., :STEPS].split(1, -1), *([x[..., STEPS:]] if x.shape[-1] > STEPS else [])]
        left = (lengths - step for step in range(STEPS + 1))
        return torch.cat(
            [
                layer(piece, lengths=count.clamp(0, piece.shape[-1]))
                for layer, piece, count in zip(self.layers, pieces, left, strict=False)
            ],
            -1,
        )


class Recognizer(nn.Module):
    """Map features (N, T, 40) to scores of the letters (N, T / 2, 29): two convolutions, two bidirectional recurrent layers."""

    def __init__(self, convolutions: bool, recurrent: bool, per_step: bool) -> None:
        """Normalize after `convolutions` and before `recurrent` layers if true, the latter for each step if `per_step`."""
        super().__init__()

        def between(channels: int) -> nn.Module:
            if not recurrent:
                return Masked()
            return PerStep(channels) if per_step else BatchNorm1d(channels)

        self.convolutions = nn.ModuleList([nn.Conv2d(1, 16, 5, 2, 2), nn.Conv2d(16, 32, 3, (2, 1), 1)])
        self.after = nn.ModuleList(BatchNorm2d(channels) if convolutions else Masked() for channels in (16, 32))
        sizes = (32 * speech.BANDS // 4, 2 * HIDDEN)
        self.before = nn.ModuleList(between(size) for size in (*sizes, 2 * HIDDEN))
        self.recurrent = nn.ModuleList(nn.GRU(size, HIDDEN, batch_first=True, bidirectional=True) for size in sizes)
        self.scores = nn.Linear(2 * HIDDEN, len(speech.ALPHABET) + 1)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The scores, and the number of valid steps of each sequence, (N,)."""
        x, lengths = x.mT.unsqueeze(1), (lengths + 1) // 2  # (N, 1, 40, T); the first convolution's stride is 2
        for convolution, normalize in zip(self.convolutions, self.after, strict=True):
            x = normalize(convolution(x), lengths=lengths).relu()
        x = x.flatten(1, 2)  # (N, C, T / 2)
        for normalize, layer in zip(self.before, self.recurrent, strict=False):
            packed = pack_padded_sequence(
                normalize(x, lengths=lengths).mT, lengths, batch_first=True, enforce_sorted=False
            )
            x = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[-1])[0].mT
        return self.scores(self.before[-1](x, lengths=lengths).mT), lengths
