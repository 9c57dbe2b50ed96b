"""What every test starts from: one thread and a fixed seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _settled():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._dynamo.reset()
