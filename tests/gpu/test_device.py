"""What only a GPU can show: real shapes, no wait for the device, CUDA graphs, mixed precision, replicas over NCCL. `make gpu` runs it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.kernels import Activation, Epilogue, Normalized, eager, gpu
from batchnorm.kernels.gpu import trust
from tests.budget import assert_same_bits, assert_ulps
from tests.gpu.conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU, or BATCHNORM_TEST_DEVICE=cuda is not set")

SHAPES = [  # of ResNet-50 at batch 128 or 256, and one with more than 2^31 values
    ((128, 64, 112, 112), torch.bfloat16, True),
    ((128, 256, 56, 56), torch.bfloat16, True),
    ((128, 64, 56, 56), torch.bfloat16, False),
    ((128, 512, 28, 28), torch.float32, False),
    ((128, 1024, 14, 14), torch.bfloat16, False),
    ((128, 2048, 7, 7), torch.float32, False),
    ((256, 2048, 7, 7), torch.float16, True),
    ((256, 2048, 7, 7), torch.bfloat16, False),
    ((2**21 + 3, 1025), torch.bfloat16, True),
]


@pytest.fixture(autouse=True)
def _the_programs_run():
    """And none of them fails, which would cost speed alone."""
    yield
    assert trust.failures() == []
    assert any(trust.any_known_good(torch.device("cuda", number)) for number in range(torch.cuda.device_count()))


def made(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> torch.Tensor:
    x = torch.randn(shape, device="cuda", dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x


@pytest.mark.parametrize(("shape", "dtype", "last"), SHAPES, ids=str)
def test_real_shapes(shape, dtype, last):
    """Right, and the same bits each time. Of the largest tensor a few channels are compared."""
    needed, free = 8 * math.prod(shape) * dtype.itemsize, torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"it needs {needed / 1e9:.0f} GB of the GPU's memory, and {free / 1e9:.0f} GB are free")
    x, dy = made(shape, dtype, last), made(shape, dtype, last)
    C = shape[1]
    epilogue = Epilogue(torch.randn(C, device="cuda"), torch.randn(C, device="cuda"), None, None, Activation("relu"))
    assert gpu.refuses(x, epilogue) is None
    y, batch, rstd, *_ = gpu.forward(x, 1e-5, epilogue)
    by = Normalized(batch.mean, rstd, batch.count)
    grads = gpu.backward(dy, x, by, epilogue)
    again = gpu.backward(dy, x, by, epilogue)
    for one, other in (
        (y, gpu.forward(x, 1e-5, epilogue).output),
        (grads.input, again.input),
        (grads.sum_grad, again.sum_grad),
    ):
        assert_same_bits("again", one, other)
    few = slice(0, C, max(C // 3, 1))
    cut = Epilogue(epilogue.weight[few].double(), epilogue.bias[few].double(), None, None, epilogue.activation)
    exact_y, exact, exact_rstd, *_ = eager.forward(x[:, few].double(), 1e-5, cut)
    assert_ulps("y", y[:, few].cpu(), exact_y.cpu(), 3.0 if dtype is torch.float32 else 0.53)
    expected = eager.backward(
        dy[:, few].double(), x[:, few].double(), Normalized(exact.mean, exact_rstd, exact.count), cut
    )
    assert_ulps("dx", grads.input[:, few].cpu(), expected.input.cpu(), 8.0 if dtype is torch.float32 else 0.53)


def network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    )
    return bn.fuse(bn.convert(body)).to("cuda", memory_format=torch.channels_last)


def batch() -> torch.Tensor:
    return torch.randn(128, 16, 56, 56, device="cuda").contiguous(memory_format=torch.channels_last)


def test_nothing_waits_for_the_device():
    model, x = network(), batch()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_a_training_step():
    model, x = network(), batch()
    expected = copy.deepcopy(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(x).square().mean().backward()
            model.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    model.load_state_dict(expected.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
        y.square().mean().backward()
    model.load_state_dict(expected.state_dict())
    for _ in range(3):
        graph.replay()
    for _ in range(3):
        expected.zero_grad()
        other = expected(x)
        other.square().mean().backward()
    torch.testing.assert_close(y, other)
    for one, two in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(one, two)


def test_an_overflow_that_gradscaler_finds_leaves_the_running_statistics():
    model, x = network(), batch()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    with torch.autocast("cuda", torch.float16):
        loss = model(x * 1e6).float().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with torch.autocast("cuda", torch.float16):
        model(x)
    assert not all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_memory_is_saved_with_the_same_bits():
    model, x = network(), batch()
    other = copy.deepcopy(model)
    model(x).square().mean().backward()
    with bn.save_memory():
        loss = other(x).square().mean()
    loss.backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_replicas_over_nccl(tmp_path):
    """One process: every operation of the group runs, and changes nothing."""
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, x = network(), batch()
        other = bn.synchronize(copy.deepcopy(model))
        for each in (model, other):
            each(x).square().mean().backward()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
def test_parameters_sharded_by_fsdp2(policy, tmp_path):
    """One process: parameters are gathered before each layer, and cast by a mixed precision policy."""
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, x = network(), batch()
        sharded = copy.deepcopy(model)
        mesh = init_device_mesh("cuda", (1,))
        dtype = getattr(torch, policy)
        fully_shard(sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=True))
        sharded(x).float().square().mean().backward()
        with torch.autocast("cuda", dtype, enabled=policy == "bfloat16"):
            loss = model(x).float().square().mean()
        loss.backward()
        near = {"rtol": 2e-2, "atol": 2e-3} if policy == "bfloat16" else {}
        for one, two in zip(sharded.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad.full_tensor(), two.grad, **near)
        for one, two in zip(sharded.buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(one, two, **near)
    finally:
        distributed.destroy_process_group()


def test_another_stream():
    """The launches go to the current stream: after what it has to do before."""
    model = network()
    x = batch()
    expected = model(x)
    side, late = torch.cuda.Stream(), torch.empty_like(x)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(200):
            late.copy_(x * 0)
        late.copy_(x)
        found = model(late)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_device_than_the_current_one():
    model, x = network(), batch()
    other = copy.deepcopy(model).to("cuda:1")
    results = []
    for each, given in ((model, x), (other, x.to("cuda:1"))):
        each(given).square().mean().backward()
        results.append([*(p.grad.cpu() for p in each.parameters()), *(b.cpu() for b in each.buffers())])
    torch.testing.assert_close(*results)
    assert torch.cuda.current_device() == 0


def test_compiled_with_a_mask():
    layer = bn.BatchNorm1d(64).to("cuda")
    x = torch.randn(64, 64, 256, device="cuda")
    mask = torch.rand(64, 256, device="cuda") > 0.3
    expected = copy.deepcopy(layer)(x, mask=mask)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x, mask=mask), expected)


def test_a_layer_is_torchs_layer():
    x, layer = torch.randn(64, 64, 56, 56, device="cuda"), nn.BatchNorm2d(64).to("cuda")
    ours = bn.convert(copy.deepcopy(layer))
    assert gpu.steps_for(x, ours.running_mean) is not None
    torch.testing.assert_close(F.relu(ours(x)), F.relu(layer(x)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.running_var, layer.running_var)
