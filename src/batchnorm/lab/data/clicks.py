"""Synthetic clicks for a recommender: sparse categories and heavy-tailed numbers with a planted structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = (2000, 1000, 200, 50, 20, 7)  # categories of user, item, brand, place, device, weekday
COUNTS = 6  # numbers such as prices, visits, seconds
RANK = 4  # size of the planted embeddings


@dataclass(frozen=True)
class Clicks:
    """Categories (N, 6) int64, numbers (N, 6) from units to many thousands, and whether there was a click (N,)."""

    categories: Tensor
    numbers: Tensor
    clicked: Tensor

    def __len__(self) -> int:
        return len(self.clicked)

    def __getitem__(self, rows: Tensor | slice) -> Clicks:
        return Clicks(self.categories[rows], self.numbers[rows], self.clicked[rows])


@dataclass(frozen=True)
class Split:
    """Three disjoint splits, and the true probabilities of a click on the test split, (N,), which no network can exceed."""

    train: Clicks
    validation: Clicks
    test: Clicks
    planted: Tensor


def load(train: int, held_out: int) -> Split:
    """Generate clicks for training, validation and test, in the given numbers; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    N = train + 2 * held_out
    # A few users, items and so on cause most of the clicks: the probability of category k is proportional to 1 / (k + 1).
    categories = torch.stack(
        [
            torch.multinomial(1 / torch.arange(1.0, size + 1), N, replacement=True, generator=generator)
            for size in SIZES
        ],
        dim=1,
    )
    normal = torch.randn(N, COUNTS, generator=generator)
    scale = torch.logspace(0, 4, COUNTS)
    numbers = (1.5 * normal).exp() * scale  # log-normal
    tastes = [torch.randn(size, RANK, generator=generator) / RANK**0.5 for size in SIZES]
    leaning = [torch.randn(size, generator=generator) for size in SIZES]
    user, item, brand = (tastes[field][categories[:, field]] for field in range(3))
    logit = (
        2 * (user * item).sum(1)
        + (user * brand).sum(1)
        + 0.4 * sum(part[categories[:, field]] for field, part in enumerate(leaning))
        + normal @ torch.linspace(-0.6, 0.6, COUNTS)
        - 1
    )
    chance = logit.sigmoid()
    everything = Clicks(categories, numbers, torch.rand(N, generator=generator) < chance)
    return Split(
        everything[:train],
        everything[train : train + held_out],
        everything[train + held_out :],
        chance[train + held_out :],
    )
