"""What every test starts from: one thread and a fixed seed."""

import pytest
import torch

from batchnorm import kernels


@pytest.fixture(autouse=True)
def _settled():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture(params=kernels.KERNELS, ids=lambda kernel: kernel.name)
def one_kernel(request, monkeypatch):
    """No kernel but this one, each in turn."""
    if request.param is kernels.cpu and kernels.cpu.unavailable() is not None:
        pytest.skip(kernels.cpu.unavailable())
    monkeypatch.setattr(kernels, "KERNELS", (request.param,))
    return request.param
