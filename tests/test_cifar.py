"""CIFAR-10's binary files, made here: what `--data` reads, without a download."""

import pytest
import torch

from batchnorm.errors import InputError
from batchnorm.lab.data import cifar
from batchnorm.lab.experiments.image_classification import load


def write_files(directory, learn=132, test=64):
    """The files, with images of noise: channel c of image i is around 20 · c + i % 10, its class."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(learn + test) % 10
    images = torch.randint(0, 50, (learn + test, 3, 32, 32), generator=generator)
    images += 20 * torch.arange(3).view(3, 1, 1) + classes.view(-1, 1, 1, 1)
    rows = torch.cat([classes[:, None], images.flatten(1)], 1).to(torch.uint8)
    half = learn // 2
    for name, part in (
        ("data_batch_1.bin", rows[:half]),
        ("data_batch_2.bin", rows[half:learn]),
        ("test_batch.bin", rows[learn:]),
    ):
        (directory / name).write_bytes(part.numpy().tobytes())
    return images, classes


def test_images_and_classes(tmp_path):
    images, classes = write_files(tmp_path)
    data = load(str(tmp_path))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [110, 22, 64]
    assert data.test.images.shape == (64, 3, 16, 16)
    assert torch.equal(data.test.labels, classes[132:])
    pooled = images[132:].float().view(64, 3, 16, 2, 16, 2).mean((3, 5))
    flat, expected = data.test.images.flatten(), pooled.flatten()
    slope = (flat.max() - flat.min()) / (expected.max() - expected.min())  # standardized: one scale, one shift
    torch.testing.assert_close(flat, (expected - expected.min()) * slope + flat.min(), rtol=1e-4, atol=1e-4)
    everything = torch.cat([data.train.images, data.validation.images])
    assert len(torch.unique(everything.flatten(1), dim=0)) == 132  # nothing trains and validates


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.bin", None, "test_batch.bin is missing"),
        ("test_batch.bin", b"", "at least 64 images of 3073 bytes, it has 0"),
        ("data_batch_2.bin", bytes(3073 * 64 + 5), "cut off"),
        ("data_batch_1.bin", b"\x0a" + bytes(3073 * 64 - 1), "classes from 0 to 9, it has 10"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    write_files(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        cifar.load(tmp_path)


def test_no_files_and_no_folder(tmp_path):
    with pytest.raises(InputError, match=r"data_batch_1\.bin is missing"):
        cifar.load(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        cifar.load(tmp_path / "nowhere")
