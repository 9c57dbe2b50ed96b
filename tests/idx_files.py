"""MNIST's four files, made from the bundled digits: what `--data` reads, without a download."""

import gzip
import struct

import numpy as np
import torch
from torch.nn import functional as F

from batchnorm.lab.data import digits


def header(kind, *shape):
    return struct.pack(f">{1 + len(shape)}I", 0x0800 + kind, *shape)


def write_idx_files(directory, train=240, test=80, zipped=False):
    """Write the files and return the images (uint8) and labels that are in them."""
    directory.mkdir(parents=True, exist_ok=True)
    with np.load(digits.FILE) as stored:
        pixels, classes = stored["pixels"], stored["classes"]
    images = torch.as_tensor(pixels[: train + test], dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = (F.interpolate(images, size=(28, 28)) * 15.9).to(torch.uint8).squeeze(1)
    labels = torch.as_tensor(classes[: train + test]).to(torch.uint8)
    for part, rows in (("train", slice(0, train)), ("t10k", slice(train, None))):
        for name, content in (
            (f"{part}-images-idx3-ubyte", header(3, *images[rows].shape) + images[rows].numpy().tobytes()),
            (f"{part}-labels-idx1-ubyte", header(1, len(labels[rows])) + labels[rows].numpy().tobytes()),
        ):
            path = directory / (name + (".gz" if zipped else ""))
            path.write_bytes(gzip.compress(content) if zipped else content)
    return images, labels
