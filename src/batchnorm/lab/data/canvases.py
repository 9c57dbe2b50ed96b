"""Two to five digits scattered on dark, noisy canvases of 64x64 pixels: data for object detection."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.lab.boxes import Labeled
from batchnorm.lab.data import digits
from batchnorm.lab.data.examples import Examples

SIZE = 64
NOISE = 0.15


@dataclass(frozen=True)
class Canvases:
    """Images (N, 1, 64, 64), and the boxes and classes of the digits on each."""

    images: Tensor
    objects: list[Labeled]


@dataclass(frozen=True)
class Split:
    """Three splits; their digits are from the corresponding splits of the bundled digits."""

    train: Canvases
    validation: Canvases
    test: Canvases


def load(train: int, held_out: int) -> Split:
    """
    Draw canvases for training, validation and test, in the given numbers; the same on every call.

    Raises:
        MissingExtraError: NumPy is not installed.
    """
    source = digits.load(8)
    low, high = source.train.images.aminmax()

    def draw(digits: Examples, count: int, seed: int) -> Canvases:
        return scatter(Examples((digits.images - low) / (high - low), digits.labels), count, seed)

    return Split(
        draw(source.train, train, 0),
        draw(source.validation, held_out, 1),
        draw(source.test, held_out, 2),
    )


def scatter(digits: Examples, count: int, seed: int) -> Canvases:
    """Canvases with digits of `digits`, (N, 1, 8, 8) in 0..1, of 12 to 22 pixels and half to full brightness, none over another."""
    rng = random.Random(seed)
    images = NOISE * torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    objects = []
    for canvas in images:
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        for _ in range(rng.randint(2, 5)):
            for _ in range(20):  # places tried for this digit
                side = rng.randint(12, 22)
                left, top = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
                right, bottom = left + side, top + side
                if all(right <= b[0] or b[2] <= left or bottom <= b[1] or b[3] <= top for b in boxes):
                    digit = rng.randrange(len(digits))
                    drawn = F.interpolate(
                        digits.images[digit : digit + 1], (side, side), mode="bilinear", align_corners=False
                    )
                    canvas[:, top:bottom, left:right] += drawn[0] * rng.uniform(0.5, 1)
                    boxes.append((left, top, right, bottom))
                    labels.append(int(digits.labels[digit]))
                    break
        objects.append(Labeled(torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels)))
    return Canvases(images, objects)
