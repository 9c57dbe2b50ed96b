"""Models of ours leave torch: torch.export and ONNX, for any batch size."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from tests.networks import FrozenBatchNorm2d, settle

KINDS = ["torch", "converted", "frozen", "folded", "fused"]
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*isinstance.treespec", "ignore:Exporting a model while"
)


class Block(nn.Module):
    """A padded convolution after a batch norm, branches, and a residual."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.large, self.small = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.large(self.first(x)) + self.small(x)
        return self.tail(self.relu(self.norm(y)))


def network(kind: str) -> nn.Module:
    torch.manual_seed(2)
    model = settle(Block()).eval()
    if kind == "folded":
        return bn.fold(model, sample(2))[0]
    changes = {"torch": lambda m: m, "converted": bn.convert, "frozen": bn.freeze, "fused": bn.fuse}
    return changes[kind](model)


def sample(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 7, 6, generator=torch.Generator().manual_seed(batch))


BATCH = ({0: torch.export.Dim("batch", min=2, max=64)},)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_export(kind, tmp_path):
    model = network(kind)
    torch.export.save(torch.export.export(model, (sample(2),), dynamic_shapes=BATCH), tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(sample(5))
    torch.testing.assert_close(found, network("torch")(sample(5)), rtol=0, atol=1e-5)


@pytest.mark.slow  # it compiles C++
@pytest.mark.parametrize("kind", KINDS)
def test_ahead_of_time(kind, tmp_path):
    program = torch.export.export(network(kind), (sample(2),), dynamic_shapes=BATCH)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    found = torch._inductor.aoti_load_package(path)(sample(5))
    torch.testing.assert_close(found, network("torch")(sample(5)), rtol=0, atol=1e-5)


def through_onnx(model: nn.Module, path, x: torch.Tensor) -> torch.Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(model, (sample(2),), dynamo=True, dynamic_shapes=BATCH, verbose=False)
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("kind", KINDS)
def test_onnx(kind, tmp_path):
    found = through_onnx(network(kind), tmp_path / "model.onnx", sample(5))
    torch.testing.assert_close(found, network("torch")(sample(5)), rtol=0, atol=1e-5)


def test_onnx_in_training_mode_normalizes_by_the_batch(tmp_path):
    model = network("converted").train()
    wanted = copy.deepcopy(model)(sample(5))
    torch.testing.assert_close(through_onnx(model, tmp_path / "model.onnx", sample(5)), wanted, rtol=0, atol=1e-5)


def test_frozen_batch_norms_of_other_libraries_leave_too(tmp_path):
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.Tanh())).eval()
    wanted = model(sample(5))
    for number, other in enumerate((bn.fold(model, sample(2))[0], bn.convert(model))):
        found = through_onnx(other, tmp_path / f"{number}.onnx", sample(5))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", ["convert", "cast"])
def test_half_precision_is_one_operator_beside_wide_statistics(dtype, first):
    """Then exporters merge it into the convolution, as they do torch's."""
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    x = sample(2).to(dtype)
    model = bn.convert(model).to(dtype) if first == "convert" else bn.convert(model.to(dtype))
    assert model[1].running_var.dtype is torch.float32
    program = torch.export.export(model, (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if not name.startswith(("aten.to.", "aten._assert_"))] == [
        "aten.conv2d.default",
        "aten.batch_norm.default",
        "aten.relu.default",
    ]
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_onnx_merges_it_into_the_convolution(dtype):
    pytest.importorskip("onnxruntime")
    model = bn.convert(settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))).eval().to(dtype)
    program = torch.onnx.export(model, (sample(2).to(dtype),), dynamo=True, verbose=False)
    assert program is not None
    assert [node.op_type for node in program.model.graph] == ["Conv", "Relu"]


@pytest.mark.parametrize("training", [True, False])
def test_the_parameters_themselves_enter_the_operator(training):
    """Quantization looks for them there, and finds no cast of one."""
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = bn.convert(nn.Sequential(*layers)).train(training)
    graph = torch.export.export(model, (sample(2),)).graph
    (node,) = (node for node in graph.nodes if node.target is torch.ops.aten.batch_norm.default)
    assert [argument.op for argument in node.args[1:5]] == ["placeholder"] * 4
