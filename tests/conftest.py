"""What every test starts from: one thread and a fixed seed. And which of them begin."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from batchnorm import kernels

os.environ["BATCHNORM_LANG"] = "en"  # whatever the locale says; the commands' processes get it too

# Seconds of the tests that take the longest. `make durations` writes them anew.
DURATIONS = json.loads(Path(__file__).with_name("durations.json").read_text())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal the tests to the workers of xdist like cards, the longest first: each worker takes a stretch of the list, and at the end of
    its own some of another's. No worker is left alone with a long one.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        items.sort(key=lambda item: -DURATIONS.get(item.nodeid, 0))
        items[:] = [item for worker in range(workers) for item in items[worker::workers]]


@pytest.fixture(autouse=True)
def _settled():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(params=[each for each in kernels.KERNELS if each is not kernels.gpu], ids=lambda kernel: kernel.name)
def one_kernel(request, monkeypatch):
    """Each kernel in turn; what it refuses falls to the last one. Those for GPUs have tests of their own, in tests/gpu."""
    if request.param is kernels.cpu and kernels.cpu.unavailable() is not None:
        pytest.skip(kernels.cpu.unavailable())
    monkeypatch.setattr(kernels, "KERNELS", (request.param, *kernels.KERNELS[-1:]))
    return request.param


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A function that writes a module into the current folder, an empty one, from which commands import it in this test alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = list[str]()

    def write(name: str, source: str) -> Path:
        names.append(name)
        sys.modules.pop(name, None)
        (tmp_path / f"{name}.py").write_text(source)
        return tmp_path

    yield write
    for name in names:
        sys.modules.pop(name, None)
