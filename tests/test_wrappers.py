"""Under torch's wrappers: data parallel, fully sharded, traced, checkpointed in half precision."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), bn.BatchNorm1d(6, activation="relu"), nn.Linear(6, 2))


def step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().sum().backward()
    optimizer.step()


def test_distributed_data_parallel(one_process):
    alone, wrapped = network(), network()
    parallel = nn.parallel.DistributedDataParallel(wrapped)
    x = torch.randn(8, 4)
    for _ in range(2):
        step(alone, x)
        step(parallel, x)
    torch.testing.assert_close(wrapped.state_dict(), alone.state_dict())


def test_fully_sharded(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, sharded = network(), network()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    x = torch.randn(8, 4)
    for _ in range(2):
        step(alone, x)
        step(sharded, x)
    full = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in sharded.state_dict().items()
    }
    torch.testing.assert_close(full, dict(alone.state_dict()))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)  # our checks are traced too
def test_jit_trace():
    model = network().eval()
    x = torch.randn(8, 4)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x * 2), model(x * 2))


def test_averaged_models():
    model = network()
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        step(model, torch.randn(8, 4))
        averaged.update_parameters(model)
    assert averaged(torch.randn(8, 4)).isfinite().all()


def test_gradient_scaling_of_a_float16_overflow():
    """A batch whose activations overflow float16: the scaler skips its step, and the running statistics skip the batch."""
    model = network().half()
    before = copy.deepcopy(model[1].running_mean)
    with torch.autocast("cpu", dtype=torch.float16):
        model(torch.full((8, 4), 6e4).half() * torch.randn(8, 1).half())
    assert torch.equal(model[1].running_mean, before)
    assert model[1].num_nonfinite_batches == 1
