"""Labeled images for the experiments, split into train, validation and test."""

from pathlib import Path

from batchnorm.lab.data import digits, idx
from batchnorm.lab.data.examples import Dataset, Examples

__all__ = ["Dataset", "Examples", "load"]


def load(directory: str | Path | None = None) -> Dataset:
    """
    Load MNIST's four IDX files from `directory`, or the bundled digits when there is none.

    Raises:
        InputError: a file is missing, is not what its name says, or shows nothing.
        MissingExtraError: NumPy is not installed.
    """
    return digits.load() if directory is None else idx.load(Path(directory))
