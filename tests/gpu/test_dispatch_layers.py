"""Whole layers with the programs underneath: steps, replicas, recomputation, mixed precision, compiled code."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.export._trace
from functorch.compile import make_boxed_func
from torch import distributed, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm import kernels
from batchnorm.functional.reduction import Reducer
from batchnorm.kernels import Epilogue, aten, eager, gpu
from batchnorm.kernels.gpu import launches, trust
from batchnorm.moments import Moments
from tests.budget import assert_same_bits
from tests.gpu.conftest import DEVICE
from tests.gpu.plans_of_tests import SPLIT, WAYS, use
from tests.layer_table import ROWS, Row

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(aten, "DEVICES", (DEVICE,))
    monkeypatch.setattr(kernels, "KERNELS", (gpu, aten, eager))
    monkeypatch.setenv(trust.CHECK, "off")
    use(monkeypatch, SPLIT)
    yield
    assert trust.failures() == []


@pytest.fixture
def exact(monkeypatch):
    """A context in which plain torch computes, in float64."""

    @contextlib.contextmanager
    def by_eager():
        with monkeypatch.context() as only:
            only.setattr(kernels, "KERNELS", (eager,))
            yield

    return by_eager


def step(layer, x, **beside):
    given = x.clone().requires_grad_()
    y = layer(given, **beside)
    y.float().square().sum().backward()
    return [y.detach(), given.grad, *(p.grad for p in layer.parameters()), *(b.clone() for b in layer.buffers())]


def compare(found, expected, rtol=1e-5, atol=1e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_layer_computes_the_same(row: Row, training, exact):
    layer = row.ours().train(training).to(DEVICE)
    other = copy.deepcopy(layer)
    x = torch.randn(row.shape, device=DEVICE)
    found = step(layer, x)
    with exact():
        compare(found, step(other, x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_is_fused(way, dtype, exact, monkeypatch):
    """Running statistics and counters are written by the programs, and no other operator runs on a tensor of x's size."""
    use(monkeypatch, WAYS[way])
    layer = bn.BatchNorm2d(3, activation="relu", running_variance="biased").to(DEVICE)
    other, x = copy.deepcopy(layer), torch.randn(4, 3, 4, 2, device=DEVICE).to(dtype)
    monkeypatch.setattr(eager, "update_running", lambda *_: pytest.fail("not fused"))
    found = step(layer, x)
    monkeypatch.undo()
    with exact():
        compare(found, step(other, x), *((1e-5, 1e-5) if dtype is torch.float32 else (2e-2, 2e-2)))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_adds_a_residual(way, activation, training, exact, monkeypatch):
    use(monkeypatch, WAYS[way])
    layer = bn.BatchNorm2d(3, activation=activation).train(training).to(DEVICE)
    other, x = copy.deepcopy(layer), torch.randn(4, 3, 4, 2, device=DEVICE)
    ours, theirs = (torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) for _ in range(2))
    found = step(layer, x, residual=ours.requires_grad_())
    with exact():
        compare(found, step(other, x, residual=theirs.requires_grad_()))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_is_not_finite_is_skipped_and_counted(way, monkeypatch):
    """So an overflow in mixed precision, which GradScaler finds later, does not spoil the running statistics."""
    use(monkeypatch, WAYS[way])
    layer = bn.BatchNorm1d(3).to(DEVICE)
    x = torch.randn(8, 3, 5, device=DEVICE)
    layer(x)
    before = [buffer.clone() for buffer in layer.buffers()]
    layer(x.masked_fill(x > 1, torch.inf))
    assert all(map(torch.equal, before, layer.buffers()))
    assert (layer.num_nonfinite_batches, layer.num_batches_tracked) == (1, 1)
    layer.on_nonfinite = "propagate"
    layer(x.masked_fill(x > 1, torch.nan))
    assert layer.running_mean is not None
    assert layer.running_mean.isnan().any()


def test_a_checkpoint_updates_once_and_computes_the_same_bits():
    layer = bn.BatchNorm1d(3, activation="silu").to(DEVICE)
    plain = copy.deepcopy(layer)
    x = torch.randn(8, 3, 5, device=DEVICE)
    expected = step(plain, x)
    found = step(lambda_of(layer), x)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert_same_bits("checkpointed", one, other)
    for one, other in zip(layer.buffers(), plain.buffers(), strict=True):
        assert_same_bits("buffers", one, other)


def lambda_of(layer: nn.Module) -> nn.Module:
    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(layer, x, use_reentrant=False)

    return Checkpointed()


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "add"])
def test_outputs_are_computed_again_to_save_memory(residual):
    layer = bn.BatchNorm1d(3, activation="relu").to(DEVICE)
    other, x = copy.deepcopy(layer), torch.randn(8, 3, 5, device=DEVICE)
    beside = {"residual": torch.randn_like(x)} if residual else {}
    expected = step(other, x, **beside)
    with bn.save_memory():
        found = step(layer, x, **beside)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits("saved", one, other)


class Twice(Reducer):
    """Two replicas with the same values: every sum counts double."""

    size = 2

    def merge(self, moments: Moments) -> Moments:
        count = torch.as_tensor(moments.count, dtype=moments.mean.dtype, device=moments.mean.device)
        return Moments(count * 2, moments.mean, moments.m2 * 2)

    def sum(self, sum_grad, sum_grad_xhat):
        return sum_grad * 2, sum_grad_xhat * 2


@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
def test_statistics_of_all_replicas(masked):
    """Between the launches, as SyncBatchNorm: the same result as of one replica that has both halves."""
    x = torch.randn(4, 3, 5, device=DEVICE)
    mask = torch.rand(4, 5, device=DEVICE) > 0.3 if masked else None
    layer = bn.BatchNorm1d(3, activation="relu").to(DEVICE)
    alone = copy.deepcopy(layer)
    layer.reducer = Twice()
    found = step(layer, x, mask=mask)
    both = step(alone, torch.cat([x, x]), mask=None if mask is None else torch.cat([mask, mask]))
    compare(found[:2], [both[0][:4], both[1][:4]])
    compare([layer.running_mean, layer.running_var], [alone.running_mean, alone.running_var])


def test_mixed_precision():
    """Under autocast a layer gets bfloat16 and keeps float32 parameters and buffers."""
    model = nn.Sequential(nn.Linear(6, 4), bn.BatchNorm1d(4, activation="relu")).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = model(torch.randn(16, 6, device=DEVICE))
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert model[1].running_mean.dtype is torch.float32


def test_parameters_sharded_by_fsdp2(exact, tmp_path):
    """The programs read the parameters that FSDP2 has gathered, also in another dtype, and write the layer's own buffers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = nn.Sequential(nn.Linear(6, 4), bn.BatchNorm1d(4, activation="relu"), nn.Linear(4, 2)).to(DEVICE)
    x = torch.randn(16, 6, device=DEVICE)
    backend = "gloo" if DEVICE == "cpu" else "nccl"
    distributed.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            alone, sharded = copy.deepcopy(model).to(dtype), copy.deepcopy(model)
            for buffer, other in zip(alone.buffers(), sharded.buffers(), strict=True):
                buffer.data = other.clone()  # in float32, whatever the parameters are
            fully_shard(sharded, mesh=init_device_mesh(DEVICE, (1,)), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
            for _ in range(2):
                found = step(sharded, x)
            with exact():
                for _ in range(2):
                    expected = step(alone, x.to(dtype))
            near = (1e-5, 1e-5) if dtype is torch.float32 else (2e-2, 2e-2)
            whole = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in found]
            compare([value.float() for value in whole], [value.float() for value in expected], *near)
            assert int(sharded[1].num_batches_tracked) == 2
    finally:
        distributed.destroy_process_group()


def test_a_second_derivative_is_exact():
    layer = bn.BatchNorm1d(2).to(DEVICE)
    x = torch.randn(5, 2, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    dx.square().sum().backward()
    other, given = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(other(given).pow(3).sum(), given, create_graph=True)
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, given.grad.float(), rtol=1e-3, atol=1e-3)


def test_func_transforms_take_plain_torch():
    layer = bn.BatchNorm1d(2).to(DEVICE).eval()
    x = torch.randn(5, 2, device=DEVICE)
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    torch.testing.assert_close(torch.func.vjp(layer, x)[1](torch.ones_like(x))[0], scale.expand(5, 2))


def test_compiled_code_takes_them_where_torch_has_no_operator(monkeypatch):
    """A mask: torch's operator takes none. The programs must have run on the device before."""
    torch._dynamo.reset()
    if (
        DEVICE == "cpu"
    ):  # the interpreter cannot record a launch, so the operators stay whole (test_ahead_of_time.py opens them)
        monkeypatch.setattr(torch.export._trace, "custom_triton_ops_decomposition_disabled", lambda: True)
    layer = bn.BatchNorm1d(3, activation="silu").to(DEVICE)
    other = copy.deepcopy(layer)
    x, mask = torch.randn(4, 3, 5, device=DEVICE), torch.rand(4, 5, device=DEVICE) > 0.3
    assert gpu.refuses(x, Epilogue()) is None
    expected = step(other, x, mask=mask)
    seen = list[str]()

    def recording(module, inputs):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return make_boxed_func(module.forward)

    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=recording, bw_compiler=recording))
    given = x.clone().requires_grad_()
    y = compiled(given, mask=mask)
    y.square().sum().backward()
    compare([y.detach(), given.grad], expected[:2])
    compare(list(layer.buffers()), list(other.buffers()))
    assert any("gpu_forward" in name or "triton_kernel" in name for name in seen), seen


def test_what_operators_return_without_values():
    """Shapes, strides and dtypes of `register_fake` are those of the launches."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from batchnorm.kernels.gpu import operators

    x = torch.randn(4, 3, 5, device=DEVICE)
    stats, dy, mask = torch.rand(2, 3, dtype=torch.float64, device=DEVICE), torch.randn_like(x), None
    activation = ("relu", 0.0)
    calls = {
        "moments": (x, mask),
        "forward": (x, None, None, None, mask, 1e-5, *activation),
        "normalize": (x, stats[0], stats[1], None, None, None, mask, None, *activation),
        "reduce_grad": (dy, x, stats[0], stats[1], None, None, None, mask, *activation, False),
        "input_grad": (dy, x, stats[0], stats[1], None, None, None, None, None, mask, *activation, False, True),
        "backward": (dy, x, stats[0], stats[1], None, False, None, None, None, mask, *activation, False, True, False),
    }
    assert set(calls) == {each._name.removeprefix("gpu_") for each in operators._FAKES}
    for name, arguments in calls.items():
        operator = getattr(torch.ops.batchnorm, f"gpu_{name}")
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        for one, other in zip(
            *((each,) if isinstance(each, torch.Tensor) else each for each in (real, fake)), strict=True
        ):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_a_count_that_is_not_that_of_x():
    """What a step has merged with another replica, as a number."""
    from batchnorm.kernels import Normalized

    x, dy = torch.randn(2, 4, 3, 5, device=DEVICE).unbind()
    batch = eager.moments(x, None)
    by = Normalized(batch.mean, batch.rstd(1e-5), 40)
    found, expected = gpu.backward(dy, x, by, Epilogue()), eager.backward(dy, x, by, Epilogue())
    assert found.input is not None
    torch.testing.assert_close(found.input, expected.input, rtol=1e-5, atol=1e-5)


def test_launches_have_no_state_between_calls(monkeypatch):
    """Two calls interleaved, as on two streams: each has its own counter and its own partial sums."""
    xs = [torch.randn(4, 3, 5, device=DEVICE) for _ in "12"]
    alone = [gpu.forward(x, 1e-5, Epilogue()) for x in xs]
    cut = gpu.cut_of(xs[0])
    assert not isinstance(cut, str)
    outputs = [(torch.empty_like(x), torch.empty(10, dtype=torch.float64, device=DEVICE)) for x in xs]
    givens = [launches.operands(x, Epilogue(), cut) for x in xs]
    last = [launches.train(x, *into, given, 1e-5) for x, into, given in zip(xs, outputs, givens, strict=True)]
    for finish in reversed(last):
        finish()
    for (y, _), expected in zip(outputs, alone, strict=True):
        assert_same_bits("y", y, expected.output)
