"""onnx's backend cases of BatchNormalization: the node cases, and the stored data of layers converted from torch.

ONNX's momentum weighs the old value, and its running variance is biased: `running_variance="biased"`, momentum = 1 - ONNX's.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.backend.test.case import node
from torch import Tensor

import batchnorm as bn
from batchnorm import reference
from tests.budget import assert_within_budget

NODE_CASES = [
    "test_batchnorm_example",
    "test_batchnorm_epsilon",
    "test_batchnorm_example_training_mode",
    "test_batchnorm_epsilon_training_mode",
]
STORED = Path(onnx.__file__).parent / "backend" / "test" / "data" / "pytorch-converted"
STORED_CASES = sorted(STORED.glob("test_BatchNorm*"))


@dataclass(frozen=True)
class Node:
    """A BatchNormalization node, its inputs, and the outputs onnx expects of it, float32."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    eps: float
    momentum: float
    training: bool
    expected: list[Tensor]
    rtol: float
    atol: float

    def layer(self, kind: type[bn.BatchNorm] = bn.BatchNorm) -> bn.BatchNorm:
        """Our layer in the node's state."""
        layer = kind(self.x.shape[1], self.eps, 1 - self.momentum, running_variance="biased")
        state = {"weight": self.weight, "bias": self.bias, "running_mean": self.mean, "running_var": self.variance}
        layer.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
        return layer.train(self.training)

    def exact(self) -> list[Tensor]:
        """The outputs by the float64 reference."""
        if not self.training:
            return [reference.inference(self.x, self.mean, self.variance, self.weight, self.bias, self.eps)]
        running = reference.running(self.mean, self.variance, self.x, 1 - self.momentum, unbiased=False)
        return [reference.forward(self.x, self.weight, self.bias, self.eps).y, *running]

    def check(self, *outputs: Tensor) -> None:
        """By onnx's own tolerance, and by ours: as near to float64 as what onnx stored, which was computed in float32."""
        names = ("y", "running mean", "running variance")
        for name, value, expected, exact in zip(names, outputs, self.expected, self.exact(), strict=False):
            np.testing.assert_allclose(value.detach(), expected, rtol=self.rtol, atol=self.atol, err_msg=name)
            assert_within_budget(name, value.detach(), expected, exact)
        assert len(outputs) == len(self.expected)


def node_of(model: onnx.ModelProto, inputs: list, outputs: list, rtol: float, atol: float) -> Node:
    """The one node of a model; inputs that the model stores itself are taken from there."""
    (node,) = model.graph.node
    assert node.op_type == "BatchNormalization"
    stored = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
    given = iter(inputs)
    values = [stored[name] if name in stored else next(given) for name in node.input]
    attributes = {value.name: onnx.helper.get_attribute_value(value) for value in node.attribute}
    return Node(
        *(torch.tensor(value) for value in values),
        eps=attributes.get("epsilon", 1e-5),
        momentum=attributes.get("momentum", 0.9),
        training=bool(attributes.get("training_mode", 0)),
        expected=[torch.tensor(value) for value in outputs],
        rtol=rtol,
        atol=atol,
    )


@pytest.fixture(scope="module")
def node_cases() -> dict[str, Node]:
    # `node.collect_testcases` imports, and so builds, the cases of every operator; one module's import builds its own alone.
    importlib.import_module("onnx.backend.test.case.node.batch_normalization")
    nodes = {}
    for case in node._NodeTestCases:
        ((inputs, outputs),) = case.data_sets
        nodes[case.name] = node_of(case.model, inputs, outputs, case.rtol, case.atol)
    return nodes


def stored_case(folder: Path) -> Node:
    model = onnx.load(folder / "model.onnx")
    (data,) = folder.glob("test_data_set_*")
    inputs, outputs = (
        [numpy_helper.to_array(onnx.load_tensor(path)) for path in sorted(data.glob(pattern))]
        for pattern in ("input_*.pb", "output_*.pb")
    )
    return node_of(model, inputs, outputs, rtol=1e-3, atol=1e-7)  # onnx's defaults for a stored case


def test_there_are_four_node_cases_and_five_stored_ones(node_cases):
    assert sorted(node_cases) == sorted(NODE_CASES)
    assert sum(node.training for node in node_cases.values()) == 2
    assert [folder.name for folder in STORED_CASES] == [
        "test_BatchNorm1d_3d_input_eval",
        "test_BatchNorm2d_eval",
        "test_BatchNorm2d_momentum_eval",
        "test_BatchNorm3d_eval",
        "test_BatchNorm3d_momentum_eval",
    ]


@pytest.mark.parametrize("name", NODE_CASES)
def test_node_by_layer(node_cases, name):
    node = node_cases[name]
    layer = node.layer()
    y = layer(node.x)
    node.check(*((y, layer.running_mean, layer.running_var) if node.training else (y,)))


@pytest.mark.parametrize("name", NODE_CASES)
def test_node_by_functions(node_cases, name):
    node = node_cases[name]
    if not node.training:
        node.check(bn.functional.normalize_with(node.x, node.mean, node.variance, node.weight, node.bias, node.eps))
        return
    y, moments = bn.functional.normalize(node.x, node.weight, node.bias, node.eps)
    running_mean, running_var = node.mean.clone(), node.variance.clone()
    bn.functional.update_running_statistics(running_mean, running_var, moments, 1 - node.momentum, unbiased=False)
    node.check(y, running_mean, running_var)


@pytest.mark.parametrize("folder", STORED_CASES, ids=lambda folder: folder.name)
def test_stored_case(folder):
    node = stored_case(folder)
    kinds = {3: bn.BatchNorm1d, 4: bn.BatchNorm2d, 5: bn.BatchNorm3d}
    for kind in (bn.BatchNorm, kinds[node.x.dim()]):
        node.check(node.layer(kind)(node.x))


def test_the_unbiased_variance_is_told_apart(node_cases):
    """The check would see torch's convention used where ONNX's is meant."""
    node = node_cases["test_batchnorm_example_training_mode"]
    layer = node.layer()
    layer.running_variance = "unbiased"
    y = layer(node.x)
    with pytest.raises(AssertionError, match="running variance"):
        node.check(y, layer.running_mean, layer.running_var)
