"""Layers in training mode, exported: torch's own operator where it computes the same, so that tools find a batch norm; else a warning."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.statistics import Domains, Ghost, MovingAverage, Renorm
from tests.layer_table import ROWS, Row, each_kind
from tests.test_sweep import equal_states, learned, sample, state_of

MORE = [
    Row("no-affine-no-tracking", lambda **k: bn.BatchNorm2d(3, affine=False, track_running_stats=False, **k), (4, 3, 5, 2)),
    Row("no-bias", lambda **k: bn.BatchNorm2d(3, bias=False, **k), (4, 3, 5, 2)),
    Row("moving-average", lambda **k: bn.BatchNorm2d(3, statistics=MovingAverage(4), **k), (4, 3, 5, 2)),
    Row("domains-ghost", lambda **k: bn.BatchNorm2d(3, statistics=Domains(("a", "b"), Ghost(2)), **k), (4, 3, 5, 2)),
    Row("renorm-at-once", lambda **k: bn.BatchNorm2d(3, statistics=Renorm(warmup=0), **k), (4, 3, 5, 2)),
]  # fmt: skip
BEYOND = {
    "cumulative", "biased", "ghost", "ghost-remainder", "renorm-warming-up", "renorm", "moving-average", "domains-ghost",
    "renorm-at-once",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*torch.jit:FutureWarning",
    "ignore:.*treespec:FutureWarning",
    "ignore:.*TorchScript-based:DeprecationWarning",
)


def warned(row):
    """The warning that a layer gives which torch's operator cannot take."""
    if row.name in BEYOND:
        return pytest.warns(UserWarning, match=r"exported as plain operations.*export the model after model\.eval")
    return contextlib.nullcontext()


def operators(program):
    return [node for node in program.graph.nodes if node.op == "call_function"]


@each_kind([*ROWS, *MORE])
def test_torch_export(row):
    exported_equals_layer(row, strict=False)


@each_kind([*ROWS, *MORE])
def test_torch_export_strictly(row):
    exported_equals_layer(row, strict=True)


def exported_equals_layer(row, strict):
    layer = learned(row)
    with warned(row):
        program = torch.export.export(copy.deepcopy(layer), (sample(row),), strict=strict)
    found = [node for node in operators(program) if node.target is torch.ops.aten.batch_norm.default]
    assert len(found) == (row.name not in BEYOND)
    if row.name != "running":
        assert all(node.args[5] is True for node in found)
    module = program.module()
    for step in range(2):
        torch.testing.assert_close(module(sample(row) + step), layer(sample(row) + step))
        state = state_of(module)  # strict export leaves out what is not used
        assert strict or state.keys() == layer.state_dict().keys()
        equal_states(state, {name: value for name, value in state_of(layer).items() if name in state})


@each_kind([*ROWS, *MORE])
def test_decomposed_programs_hold_no_graph_in_their_buffers(row):
    model = nn.Sequential(row.ours(), nn.Identity())
    x = sample(row)
    with warned(row):
        program = torch.export.export(nn.Sequential(Scaled(), model), (x,)).run_decompositions().module()
    for _ in range(3):
        y = program(x)
        if row.name in BEYOND:  # torch's operator saves buffers for its backward, which it may not write then
            y.sum().backward()
    assert not [name for name, value in program.named_buffers() if value.requires_grad]
    copy.deepcopy(model)


class Scaled(nn.Module):
    """Gives what comes next an input that needs a gradient."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


@each_kind([*ROWS, *MORE])
def test_jit_trace_takes_other_batch_sizes(row):
    if row.name == "ghost-remainder" or "ghost" in row.name:
        pytest.skip("how many groups there are is fixed when it is traced")
    layer = learned(row)
    with warned(row):
        traced = torch.jit.trace(copy.deepcopy(layer), sample(row), check_trace=False)
    layer(sample(row))  # as tracing did
    for tail in (1, 3):
        x = torch.cat([sample(row), sample(row)[:tail] * 2])
        torch.testing.assert_close(traced(x), layer(x))
        equal_states(dict(traced.state_dict()), state_of(layer))
    assert not any(value.requires_grad for value in traced.buffers())


@pytest.mark.filterwarnings("ignore")  # both exporters warn of training mode
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_older_onnx_exporter_writes_training_mode(activation):
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation=activation)).train()
    file = io.BytesIO()
    preserve = torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        model, (torch.randn(2, 3, 8, 8),), file, dynamo=False, training=preserve, do_constant_folding=False
    )
    nodes = onnx.load_from_string(file.getvalue()).graph.node
    (norm,) = (node for node in nodes if node.op_type == "BatchNormalization")
    assert {field.name: field.i for field in norm.attribute}["training_mode"] == 1


@pytest.mark.filterwarnings("ignore")  # both exporters warn of training mode
@pytest.mark.parametrize("source", [None, bn.statistics.Ghost(2)], ids=["Batch", "Ghost"])
def test_the_newer_onnx_exporter_normalizes_by_the_batch(source):
    runtime = pytest.importorskip("onnxruntime")
    layer, x, file = bn.BatchNorm2d(3, statistics=source), torch.randn(4, 3, 5, 2) * 3 + 1, io.BytesIO()
    torch.onnx.export(copy.deepcopy(layer), (x,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_function_in_training(dtype, residual):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, dtype=dtype))
            self.register_buffer("variance", torch.ones(3, dtype=dtype))

        def forward(self, x):
            beside = x if residual else None
            return bn.functional.batch_norm(
                x, self.mean, self.variance, training=True, activation="relu", residual=beside
            )

    x = torch.randn(4, 3, 5, dtype=dtype)
    program = torch.export.export(Model(), (x,))
    assert any(node.target is torch.ops.aten.batch_norm.default for node in operators(program))
    eager, exported = Model(), program.module()
    torch.testing.assert_close(exported(x), eager(x))
    torch.testing.assert_close(dict(exported.named_buffers()), dict(eager.named_buffers()))


def test_masks_and_wide_statistics_are_more_than_torchs():
    x, mask = torch.randn(4, 3, 5), torch.ones(4, 5, dtype=torch.bool)
    with pytest.warns(UserWarning, match="its call has a mask"):
        torch.export.export(bn.BatchNorm1d(3), (x, None, mask))
    layer = bn.BatchNorm1d(3)
    layer.running_var = layer.running_var.double()
    with pytest.warns(UserWarning, match="not all alike"):
        torch.export.export(layer, (x,))
    with pytest.raises(bn.errors.ShapeError):
        torch.export.export(bn.BatchNorm1d(4), (x,))


def test_a_switch_to_inference_finds_it():
    """As torchao's `move_exported_model_to_eval` does: statistics of the batch are exchanged for the running ones."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    x = torch.randn(4, 3, 8, 8)
    model = bn.fuse(bn.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).train())
    program = torch.export.export(model, (x,)).module()
    pt2e.move_exported_model_to_eval(program)
    other = torch.cat([x[:1], x[1:] * 9])
    torch.testing.assert_close(program(x)[0], program(other)[0])


def test_a_flop_counter_sees_torchs_operators():
    fvcore = pytest.importorskip("fvcore.nn")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    torchs, ours = (
        fvcore.FlopCountAnalysis(model, torch.randn(2, 3, 8, 8)).unsupported_ops_warnings(False).total()
        for model in (net, bn.convert(copy.deepcopy(net)))
    )
    assert torchs > 0
    assert ours == torchs
