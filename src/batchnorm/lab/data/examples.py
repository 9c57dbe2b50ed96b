"""The data structures of the lab's image data sets."""

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
    """
    Three disjoint splits: networks train on `train`, choices are made on `validation`, results are reported on `test`.

    `fingerprint` changes when the data change.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    fingerprint: str

    def standardized(self) -> "Dataset":
        """
        Standardize every split with the mean and standard deviation of all training pixels.

        Raises:
            InputError: the training pixels are all the same.
        """
        low, high = self.train.images.aminmax()
        if low == high:  # rounding may give a deviation above 0
            raise InputError(
                f"training images must show something; every pixel of all {len(self.train)} in the {self.name} is "
                f"{float(low):g} of 1: give other images"
            )
        deviation, mean = torch.std_mean(self.train.images)

        def standardize(split: Examples) -> Examples:
            return Examples((split.images - mean) / deviation, split.labels)

        return Dataset(
            self.name, standardize(self.train), standardize(self.validation), standardize(self.test), self.fingerprint
        )

    def to(self, device: str) -> "Dataset":
        """Copy the data to a device."""
        train, validation, test = (split.to(device) for split in (self.train, self.validation, self.test))
        return Dataset(self.name, train, validation, test, self.fingerprint)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of examples in each split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def drawn(name: str, learn: Examples, test: Examples, fingerprint: str) -> Dataset:
    """A standardized data set of a user's own images: of `learn` a fixed random draw of at most 10 000 trains, and of 500 others validates.

    Raises:
        InputError: the training pixels are all the same.
    """
    validation = min(VALIDATION, len(learn) // 6)
    order = torch.randperm(len(learn), generator=torch.Generator().manual_seed(0))
    return Dataset(
        name=name,
        train=learn[order[validation : validation + TRAIN]],
        validation=learn[order[:validation]],
        test=test,
        fingerprint=fingerprint,
    ).standardized()
