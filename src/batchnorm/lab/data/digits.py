"""The handwritten digits that come with scikit-learn: 1797 images of 8x8 pixels, no download."""

import torch
from torch.nn import functional as F

from batchnorm.lab import extras
from batchnorm.lab.data.examples import Dataset, Examples

VALIDATION = 240
TEST = 360


def load(size: int = 28) -> Dataset:
    """
    Load the digits, resized bilinearly to (N, 1, size, size) and standardized; 1197 train, 240 validate, 360 test.

    The parts hold the ten classes in equal shares and are the same on every call.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    extras.require()
    import sklearn
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)  # (1797, 1, size, size)
    examples = Examples(images, torch.as_tensor(classes, dtype=torch.int64))

    def split(index: list[int], held_out: int) -> tuple[list[int], list[int]]:
        kept, held = train_test_split(index, test_size=held_out, stratify=classes[index], random_state=0)
        return list(kept), list(held)

    index, test = split(list(range(len(examples))), TEST)
    train, validation = split(index, VALIDATION)
    return Dataset(
        name="scikit-learn digits",
        train=examples[torch.tensor(train)],
        validation=examples[torch.tensor(validation)],
        test=examples[torch.tensor(test)],
        fingerprint=f"digits-{size}-sklearn-{sklearn.__version__}",
    ).standardized()
