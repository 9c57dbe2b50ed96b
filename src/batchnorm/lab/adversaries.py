"""Adversarial networks that generate digits of 16x16 pixels, and the classifier whose features evaluate them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.data import Dataset, digits
from batchnorm.lab.train import batches
from batchnorm.layers import BatchNorm1d, BatchNorm2d
from batchnorm.statistics import Statistics

NOISE, WIDTH = 64, 16  # the generator's inputs, and the discriminator's first channels


def networks(
    generates: bool, discriminates: bool, statistics: Statistics | None
) -> tuple[nn.Sequential, nn.Sequential]:
    """Create a generator, from noise (N, 64) to images (N, 1, 16, 16) in -1..1, and a discriminator, from images to scores (N, 1).

    DCGAN (Radford et al. 2016) with one more convolution at each size; no BN on the generator's output and the discriminator's input.

    Args:
        generates: whether the generator has batch normalization.
        discriminates: whether the discriminator has batch normalization.
        statistics: the statistics source of the discriminator's layers; None is `Batch()`.
    """
    C = WIDTH

    def up(convolution: nn.Module, channels: int) -> list[nn.Module]:
        return [convolution, BatchNorm2d(channels) if generates else nn.Identity(), nn.ReLU()]

    def down(convolution: nn.Module, channels: int) -> list[nn.Module]:
        normalization = BatchNorm2d(channels, statistics=statistics) if discriminates else nn.Identity()
        return [convolution, normalization, nn.LeakyReLU(0.2)]

    generator = nn.Sequential(
        nn.Unflatten(1, (NOISE, 1, 1)),
        *up(nn.ConvTranspose2d(NOISE, 4 * C, 4), 4 * C),
        *up(nn.Conv2d(4 * C, 4 * C, 3, padding=1), 4 * C),
        *up(nn.ConvTranspose2d(4 * C, 2 * C, 4, 2, 1), 2 * C),
        *up(nn.Conv2d(2 * C, 2 * C, 3, padding=1), 2 * C),
        *(nn.ConvTranspose2d(2 * C, 1, 4, 2, 1), nn.Tanh()),
    )
    discriminator = nn.Sequential(
        *(nn.Conv2d(1, C, 4, 2, 1), nn.LeakyReLU(0.2)),
        *down(nn.Conv2d(C, 2 * C, 4, 2, 1), 2 * C),
        *down(nn.Conv2d(2 * C, 2 * C, 3, padding=1), 2 * C),
        *(nn.Conv2d(2 * C, 1, 4), nn.Flatten()),
    )
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        if parameter.dim() == 4:  # DCGAN's initialization
            nn.init.normal_(parameter, 0, 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return generator, discriminator


@lru_cache(maxsize=1)
def judged_by() -> tuple[Dataset, tuple[nn.Module, nn.Module]]:
    """The digits at 16x16, and the features (N, 64) and scores (N, 10) of a classifier; the same for every arm and seed."""
    dataset = digits.load(16)
    images = in_range(dataset.train.images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), BatchNorm2d(16, activation="relu")),
            *(nn.Conv2d(16, 32, 3, 2, 1), BatchNorm2d(32, activation="relu")),
            *(nn.Flatten(), nn.Linear(512, 64), BatchNorm1d(64, activation="relu")),
        )
        classifier = nn.Sequential(features, nn.Linear(64, 10))
        optimizer, order = torch.optim.Adam(classifier.parameters(), lr=2e-3), batches(len(images), 64, seed=0)
        for _ in range(250):
            rows = next(order)
            noisy = images[rows] + 0.1 * torch.randn(64, 1, 16, 16)
            optimizer.zero_grad()
            F.cross_entropy(classifier(noisy), dataset.train.labels[rows]).backward()
            optimizer.step()
    classifier.eval().requires_grad_(False)
    return dataset, (features, classifier[1])


def in_range(images: Tensor) -> Tensor:
    """Scale images so that the darkest and brightest pixel are -1 and 1, the range of the generator's tanh."""
    low, high = images.aminmax()
    return (images - low) / (high - low) * 2 - 1
