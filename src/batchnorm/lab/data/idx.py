"""MNIST's IDX files (http://yann.lecun.com/exdb/mnist: big-endian header, then unsigned bytes), plain or gzipped."""

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.lab.data.examples import Dataset, Examples, drawn

REMEDY = "download the file again"


def load(directory: Path) -> Dataset:
    """
    Load a standardized data set from `{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]` in `directory`.

    A fixed random sample of the training files gives at most 10 000 training and 500 validation images; all images of the test files are
    test images.

    Raises:
        InputError: a file is missing or is not IDX, or the files contradict each other or have only one color.
    """
    if not directory.is_dir():
        raise InputError(f"--data must be a folder with MNIST's IDX files; there is no folder {directory}")
    return drawn("IDX files", _examples(directory, "train"), _examples(directory, "t10k"))


def _examples(directory: Path, split: str) -> Examples:
    """The images and labels of "train" or "t10k"."""
    image_file, label_file = _find(directory, f"{split}-images", "idx3"), _find(directory, f"{split}-labels", "idx1")
    images, labels = read(image_file, dimensions=3), read(label_file, dimensions=1)
    if len(images) != len(labels):
        raise InputError(
            f"images and labels must come in pairs; {image_file.name} holds {len(images)} and "
            f"{label_file.name} holds {len(labels)}: take both from the same source"
        )
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        raise InputError(f"images must be 28x28 as MNIST's; {image_file.name} holds {height}x{width}")
    if len(labels) < 64 or int(labels.max()) > 9:
        raise InputError(
            f"at least 64 labels from 0 to 9 are needed; {label_file.name} holds {len(labels)}"
            + (f", up to {int(labels.max())}" if len(labels) else "")
        )
    return Examples(images.unsqueeze(1).float() / 255, labels.long())


def _find(directory: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{separator}{kind}-ubyte{suffix}" for separator in "-." for suffix in ("", ".gz")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"MNIST has four IDX files; {names[0]} (or .gz) is missing in {directory}")


def read(path: Path, dimensions: int) -> Tensor:
    """
    Read one IDX file of unsigned bytes with the given number of dimensions into a uint8 tensor.

    Raises:
        InputError: it cannot be read, or its header or its length is wrong.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}; {REMEDY}") from error
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise InputError(f"{path} must begin with {header} bytes of IDX header, it has {len(content)} bytes; {REMEDY}")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header])
    if magic != 0x0800 + dimensions:
        raise InputError(f"{path} must begin with the IDX number {0x0800 + dimensions}, it has {magic}; {REMEDY}")
    if len(content) - header != prod(shape):
        raise InputError(
            f"{path} announces {' x '.join(map(str, shape))} = {prod(shape)} bytes, "
            f"{len(content) - header} follow; {REMEDY}"
        )
    if not prod(shape):
        raise InputError(f"{path} must hold something, but announces {' x '.join(map(str, shape))}; {REMEDY}")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)
