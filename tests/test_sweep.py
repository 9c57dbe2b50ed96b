"""Every layer of the table through everything torch can do with a module."""

import copy
import io
import pickle

import onnxruntime
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.statistics import Mixed
from tests.layer_table import ROWS, Row, each_kind

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
rows_of_torch = pytest.mark.parametrize("row", [row for row in ROWS if row.torchs], ids=lambda row: row.name)


def learned(row: Row, **options) -> nn.Module:
    """The row's layer with parameters and buffers that are not the initial ones."""
    torch.manual_seed(1)
    layer = row.ours(**options)
    for value in (*layer.parameters(), *layer.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.5, 1.5)
    return layer


def sample(row: Row, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(row.shape, generator=torch.Generator().manual_seed(2)).to(dtype).mul_(2).add_(1)


def state_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def equal_states(one: dict, other: dict, **tolerance) -> None:
    torch.testing.assert_close(one, other, **tolerance)


@rows_of_torch
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_three_steps_equal_torchs(row, training, dtype):
    ours, torchs = learned(row, dtype=dtype).train(training), row.torchs(dtype=dtype).train(training)
    state = state_of(ours)
    torchs.load_state_dict(state if not isinstance(torchs, nn.Sequential) else {f"0.{k}": v for k, v in state.items()})
    for step in range(3):
        x = (sample(row, dtype) + step).requires_grad_()
        results = []
        for layer in (ours, torchs):
            y = layer(x)
            weighed = (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum()
            results.append((y, *torch.autograd.grad(weighed, [x, *layer.parameters()])))
        torch.testing.assert_close(*results)
    final = torchs[0] if isinstance(torchs, nn.Sequential) else torchs
    equal_states(state_of(ours), state_of(final))


@pytest.mark.parametrize(
    "fast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["projected", "entry by entry"]
)
@pytest.mark.parametrize("row", [row for row in ROWS if not row.constants_from_input], ids=lambda row: row.name)
def test_gradcheck(row, fast):
    layer = learned(row, dtype=torch.float64)
    x = sample(row, torch.float64).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        state = {**dict(zip(names, parameters, strict=True)), **{k: v.clone() for k, v in layer.named_buffers()}}
        return torch.func.functional_call(layer, state, (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=fast)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=fast)


@each_kind(ROWS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_compiles_in_one_graph(row, training):
    eager, compiled = learned(row).train(training), learned(row).train(training)
    program = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(2):
        x = (sample(row) + step).requires_grad_()
        results = []
        for layer, call in ((eager, eager), (compiled, program)):
            y = call(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
        torch.testing.assert_close(*results)
        equal_states(state_of(eager), state_of(compiled))


def test_compiles_with_inductor_and_dynamic_shapes():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 1))
    program = torch.compile(copy.deepcopy(network), fullgraph=True, dynamic=True)
    for N in (2, 5):
        x = torch.randn(N, 3, 6, 6)
        torch.testing.assert_close(program(x), network(x), rtol=1e-4, atol=1e-5)


@every_row
def test_exports_to_torchs_operator(row):
    layer = learned(row).eval()
    program = torch.export.export(layer, (sample(row),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(sample(row)), layer(sample(row)))
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    mixes = isinstance(layer.statistics, Mixed)  # its inference depends on the batch
    if layer.running_mean is not None and not mixes:
        assert any("batch_norm" in operator for operator in operators), operators


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.onnx uses what torch deprecates
@pytest.mark.parametrize("activation", [pytest.param(None, marks=pytest.mark.slow), "relu", "silu"], ids=str)
def test_exports_to_onnx(activation):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation=activation), nn.Conv2d(4, 2, 1), bn.BatchNorm2d(2)
    )
    for _ in range(3):
        network(torch.randn(8, 3, 9, 9))
    network.eval()
    file = io.BytesIO()
    x = torch.randn(2, 3, 9, 9)
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.onnx.export(network, (x,), file, dynamo=True, dynamic_shapes={"input": {0: batch}}, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    for N in (2, 7):
        x = torch.randn(N, 3, 9, 9)
        (y,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), network(x), rtol=1e-5, atol=1e-5)


@every_row
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_apart(row, clone):
    layer = learned(row)
    twin = clone(layer)
    assert repr(twin) == repr(layer)
    torch.testing.assert_close(twin(sample(row)), layer(sample(row)), rtol=0, atol=0)
    equal_states(state_of(twin), state_of(layer), rtol=0, atol=0)
    before = state_of(twin)
    layer(sample(row) + 1)
    equal_states(state_of(twin), before, rtol=0, atol=0)


@every_row
def test_meta_device(row):
    layer = row.ours(device="meta")
    y = layer(torch.empty(row.shape, device="meta"))
    assert y.shape == torch.Size(row.shape)
    assert y.is_meta
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert real(sample(row)).isfinite().all()


@every_row
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_float32_statistics(row, dtype):
    layer = learned(row)
    statistics = [value.clone() for value in (layer.running_mean, layer.running_var) if value is not None]
    layer.to(dtype)
    kept = [value for value in (layer.running_mean, layer.running_var) if value is not None]
    torch.testing.assert_close(kept, statistics, rtol=0, atol=0)
    y = layer(sample(row, dtype))
    assert y.dtype == dtype
    wide = learned(row)(sample(row, dtype).float())
    torch.testing.assert_close(
        y.float(), wide, rtol=0, atol=0.03
    )  # half an ulp of bfloat16 at 4, for y and the parameters


@every_row
def test_vmap_over_stacked_state_equals_a_loop(row):
    layers = [learned(row) for _ in range(2)]
    layers[1](sample(row) * 3)
    x = torch.stack([sample(row), sample(row) - 1])
    parameters, buffers = torch.func.stack_module_state(layers)
    parameters = {name: value.detach() for name, value in parameters.items()}
    y = torch.vmap(lambda p, b, x: torch.func.functional_call(layers[0], (p, b), (x,)))(parameters, buffers, x)
    torch.testing.assert_close(y, torch.stack([layer(slice_) for layer, slice_ in zip(layers, x, strict=True)]))
    for name, stacked in buffers.items():
        torch.testing.assert_close(stacked, torch.stack([dict(layer.named_buffers())[name] for layer in layers]))


@every_row
def test_func_grad_and_jvp(row):
    layer, twin = learned(row), learned(row)
    x, direction = sample(row), sample(row).roll(1, 0)
    grad = torch.func.grad(lambda x: layer(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(twin(leaf).square().sum(), leaf)
    torch.testing.assert_close(grad, expected)
    equal_states(state_of(layer), state_of(twin))
    _, tangent = torch.func.jvp(lambda x: layer(x), (x,), (direction,))
    torch.testing.assert_close((2 * layer(x) * tangent).sum(), (grad * direction).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        pytest.param(row, layout, id=f"{row.name}-{layout}")
        for row in ROWS
        for layout, rank in (
            (torch.contiguous_format, len(row.shape)),
            (torch.channels_last, 4),
            (torch.channels_last_3d, 5),
        )
        if len(row.shape) == rank
    ],
)
def test_memory_format_is_kept(row, layout):
    x = sample(row).contiguous(memory_format=layout).requires_grad_()
    y = learned(row)(x)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, learned(row)(x.contiguous()))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.is_contiguous(memory_format=layout)


@every_row
def test_is_a_leaf_of_fx(row):
    network = nn.Sequential(nn.Identity(), learned(row))
    graph = torch.fx.symbolic_trace(network)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(graph(sample(row)), learned(row)(sample(row)))


@every_row
def test_autocast(row):
    layer = learned(row)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(sample(row)).dtype == torch.float32
        assert layer(sample(row, torch.bfloat16)).dtype == torch.bfloat16
