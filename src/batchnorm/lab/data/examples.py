"""The data structures of the lab's image data sets."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.errors import InputError

TRAIN = 10_000  # of MNIST's 60 000; 1000 steps with batches of 64 use each image about six times
VALIDATION = 500


@dataclass(frozen=True)
class Examples:
    """Images (N, 1, H, W), or (N, 3, H, W) in color, in float32 and their classes (N,) in int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Examples":
        return Examples(self.images[index], self.labels[index])

    def to(self, device: str) -> "Examples":
        """Copy the examples to a device."""
        return Examples(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits: networks train on `train`, choices are made on `validation`, results are reported on `test`."""

    name: str
    train: Examples
    validation: Examples
    test: Examples

    def standardized(self) -> "Dataset":
        """
        Standardize every split with the mean and standard deviation of all training pixels.

        Raises:
            InputError: the training pixels are all the same.
        """
        low, high = self.train.images.aminmax()
        if low == high:  # rounding may give a deviation above 0
            raise InputError(
                f"training images must not be constant; every pixel of all {len(self.train)} in the {self.name} is "
                f"{float(low):g} of 1: use other images"
            )
        deviation, mean = torch.std_mean(self.train.images)
        return self._each(lambda split: Examples((split.images - mean) / deviation, split.labels))

    def to(self, device: str) -> "Dataset":
        """Copy the data to a device."""
        return self._each(lambda split: split.to(device))

    def _each(self, change: Callable[[Examples], Examples]) -> "Dataset":
        return Dataset(self.name, change(self.train), change(self.validation), change(self.test))


def drawn(name: str, learn: Examples, test: Examples) -> Dataset:
    """Make a standardized data set of a user's images: a fixed draw from `learn` of at most 10 000 to train and 500 others to validate.

    Raises:
        InputError: the training pixels are all the same.
    """
    validation = min(VALIDATION, len(learn) // 6)
    order = torch.randperm(len(learn), generator=torch.Generator().manual_seed(0))
    train = learn[order[validation : validation + TRAIN]]
    return Dataset(name, train, learn[order[:validation]], test).standardized()
