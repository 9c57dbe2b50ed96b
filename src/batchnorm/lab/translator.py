"""A small transformer (Vaswani et al. 2017) with batch, layer or no normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchnorm.lab.data import sentences
from batchnorm.layers import BatchNorm1d

WIDTH, HEADS, LAYERS = 64, 4, 2


class Normalize(nn.Module):
    """Batch, layer or no normalization of (N, T, C); only the first `lengths` steps of each sequence are valid."""

    def __init__(self, normalization: str) -> None:
        super().__init__()
        self.layer = {
            "none": nn.Identity(),
            "batch_norm": BatchNorm1d(WIDTH, channel_axis=-1),
            "layer_norm": nn.LayerNorm(WIDTH),
        }[normalization]

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.layer(x, lengths=lengths) if isinstance(self.layer, BatchNorm1d) else self.layer(x)


class Block(nn.Module):
    """Self-attention, attention to the source (decoder only), two linear layers; a normalization before each (Xiong et al. 2020)."""

    def __init__(self, normalization: str, decodes: bool) -> None:
        super().__init__()
        self.decodes = decodes
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(1 + decodes)
        )
        self.linear = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.before = nn.ModuleList(Normalize(normalization) for _ in range(2 + decodes))

    def forward(self, x: Tensor, lengths: Tensor, source: Tensor | None = None, absent: Tensor | None = None) -> Tensor:
        y, T = self.before[0](x, lengths), x.shape[1]
        future = torch.ones(T, T, dtype=torch.bool).triu(1) if self.decodes else None
        padding = None if self.decodes else absent
        x = x + self.attention[0](y, y, y, key_padding_mask=padding, attn_mask=future, need_weights=False)[0]
        if source is not None:
            y = self.before[1](x, lengths)
            x = x + self.attention[1](y, source, source, key_padding_mask=absent, need_weights=False)[0]
        return x + self.linear(self.before[-1](x, lengths))


class Translator(nn.Module):
    """Map source words (N, S) and a translation (N, T) to scores of the next word at each position (N, T, words)."""

    def __init__(self, normalization: str) -> None:
        super().__init__()
        self.words = nn.ModuleList(
            nn.Embedding(count, WIDTH) for count in (sentences.SOURCE_WORDS, sentences.TARGET_WORDS)
        )
        self.places = nn.Parameter(torch.randn(16, WIDTH))
        self.encoder = nn.ModuleList(Block(normalization, decodes=False) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(Block(normalization, decodes=True) for _ in range(LAYERS))
        self.after = nn.ModuleList(Normalize(normalization) for _ in range(2))
        self.scores = nn.Linear(WIDTH, sentences.TARGET_WORDS)

    def encode(self, pairs: sentences.Pairs) -> tuple[Tensor, Tensor]:
        """The encoded source for the decoder (N, S, C), and a mask of its padding (N, S)."""
        absent = torch.arange(pairs.source.shape[1]) >= pairs.lengths[:, None]
        x = self.words[0](pairs.source) + self.places[: pairs.source.shape[1]]
        for block in self.encoder:
            x = block(x, pairs.lengths, absent=absent)
        return self.after[0](x, pairs.lengths), absent

    def decode(self, said: Tensor, lengths: Tensor, source: Tensor, absent: Tensor) -> Tensor:
        """Scores of the next word after each word of `said`, which starts with END."""
        x = self.words[1](said) + self.places[: said.shape[1]]
        for block in self.decoder:
            x = block(x, lengths, source, absent)
        return self.scores(self.after[1](x, lengths))
