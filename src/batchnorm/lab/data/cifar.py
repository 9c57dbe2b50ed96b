"""CIFAR-10's binary files (https://www.cs.toronto.edu/~kriz/cifar.html): a byte of class, then 3 x 32 x 32 bytes of red, green and blue."""

from pathlib import Path

import torch
from torch.nn import functional as F

from batchnorm.errors import InputError
from batchnorm.lab.data.examples import Dataset, Examples, drawn

LEARN, TEST = tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"
RECORD = 1 + 3 * 32 * 32


def load(directory: Path) -> Dataset:
    """
    Load a standardized data set of (N, 3, 16, 16) images, averaged over 2x2 pixels, from the files in `directory`.

    A fixed random sample of the `data_batch` files gives at most 10 000 training and 500 validation images; `test_batch` is the test
    split.

    Raises:
        InputError: a file is missing, is not CIFAR-10's, or has only one color.
    """
    if not directory.is_dir():
        raise InputError(f"--data must be a folder with CIFAR-10's binary files; there is no folder {directory}")
    learn = [directory / name for name in LEARN if (directory / name).is_file()]
    for name, found in ((LEARN[0], learn), (TEST, (directory / TEST).is_file())):
        if not found:
            raise InputError(f"CIFAR-10 has {LEARN[0]} to 5 and {TEST}; {name} is missing in {directory}")
    contents = [_read(path) for path in (*learn, directory / TEST)]
    return drawn("CIFAR-10 files", _examples(b"".join(contents[:-1])), _examples(contents[-1]))


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    records, rest = divmod(len(content), RECORD)
    if rest or records < 64:
        raise InputError(
            f"{path} must hold at least 64 images of {RECORD} bytes, it has {len(content)} bytes: it is cut off, or another file"
        )
    highest = max(content[::RECORD])
    if highest > 9:
        raise InputError(f"{path} must hold classes from 0 to 9, it has {highest}; CIFAR-100 is another format")
    return content


def _examples(content: bytes) -> Examples:
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).float() / 255
    return Examples(F.avg_pool2d(images, 2), records[:, 0].long())
