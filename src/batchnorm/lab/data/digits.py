"""
Handwritten digits, 1797 images of 8x8 pixels in 17 shades, as scikit-learn distributes them; no download, and scikit-learn is not needed.

`digits.npz` has the images and their splits. Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998,
CC BY 4.0. The splits are stratified by class: scikit-learn's `train_test_split(..., stratify=classes, random_state=0)`, twice.
"""

from pathlib import Path

import torch
from torch.nn import functional as F

from batchnorm.lab import extras
from batchnorm.lab.data.examples import Dataset, Examples

FILE = Path(__file__).with_suffix(".npz")


def load(size: int = 28) -> Dataset:
    """
    Load the digits, resized bilinearly to (N, 1, size, size) and standardized; 1197 train, 240 validate, 360 test.

    Raises:
        MissingExtraError: NumPy is not installed.
    """
    extras.require()
    import numpy as np

    with np.load(FILE) as stored:
        of_file = {name: torch.from_numpy(values) for name, values in stored.items()}
    images = of_file["pixels"].float().reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)  # (1797, 1, size, size)
    examples = Examples(images, of_file["classes"].long())
    train, validation, test = (examples[of_file[split].long()] for split in ("train", "validation", "test"))
    return Dataset("scikit-learn digits", train, validation, test).standardized()
