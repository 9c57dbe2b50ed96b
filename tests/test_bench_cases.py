"""What is measured: the shapes are real networks', the cases complete, and bad input is one line."""

import importlib.util
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from batchnorm.bench import device, suite
from batchnorm.bench.case import Case, cases, laid_out, quick, tensors, with_batch
from batchnorm.bench.providers import find
from batchnorm.bench.suite import Layer, Suite
from batchnorm.cli import commands
from batchnorm.errors import InputError
from batchnorm.lab.networks import Bottleneck, resnet50
from batchnorm.measure import Effort

ROOT = Path(__file__).parent.parent


def call(*arguments):
    return CliRunner().invoke(commands, ["bench", *map(str, arguments)])


def case(shape=(2, 3, 4, 4), **changes):
    layer = Layer(shape, activation="relu")
    given = Case("made-up", layer, "function", "planar", "float32", "forward", "fresh", 1)
    return replace(given, **changes)


class TestShapes:
    def test_files_are_what_the_papers_tables_give(self):
        path = ROOT / "benchmarks" / "derive_shapes.py"
        spec = importlib.util.spec_from_file_location("derive_shapes", path)
        derive = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(derive)
        assert sorted([*derive.HEADS, "never-slower", "scaling"]) == suite.names()
        for name in derive.HEADS:
            assert (derive.SHAPES / f"{name}.toml").read_text() == derive.toml(name), f"run {path.name}"

    @pytest.mark.parametrize("name", suite.names())
    def test_files_are_valid(self, name):
        loaded = suite.load(name)
        assert loaded.name == name
        assert len(set(loaded.layers)) == len(loaded.layers)
        if name == "tiny":
            assert all(4 * math.prod(layer.shape) <= 64 * 1024 for layer in loaded.layers)
            assert loaded.through == "layer"

    def test_resnet50_is_what_our_network_normalizes(self):
        """Shape, ReLU and residual of every batch norm, seen from inside a network on the meta device."""
        with torch.device("meta"):
            network, x = resnet50(), torch.empty(2, 3, 224, 224)
        found = []
        for module in network.modules():
            body = list(module.body) if isinstance(module, Bottleneck) else []
            children = list(module) if isinstance(module, nn.Sequential) else []
            for child, follower in zip(children, [*children, None][1:], strict=True):
                if isinstance(child, nn.BatchNorm2d):
                    child.relu = isinstance(follower, nn.ReLU)
            if body:
                body[-1].adds = True
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(lambda layer, inputs, _: found.append((layer, tuple(inputs[0].shape[1:]))))
        network(x)
        counted = {}
        for layer, shape in found:
            adds = hasattr(layer, "adds")
            key = (shape, "relu" if layer.relu or adds else None, adds)
            counted[key] = counted.get(key, 0) + 1
        loaded = suite.load("resnet50")
        assert counted == {(one.shape[1:], one.activation, one.residual): one.count for one in loaded.layers}
        assert sum(counted.values()) == 53
        assert sum(p.numel() for p in network.parameters()) == 25_557_032  # He et al.'s and torchvision's

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("name = ", "must be a suite"),
            ('name = "a"\nsource = "b"\nbatch = 2\n', "'layers' is missing"),
            ('name = "a"\nsource = "b"\nbatch = 2\nlayers = []', "empty"),
            ('name = "a"\nsource = "b"\nbatch = 2\nlayers = [{ shape = [3, 0] }]', "positive integers"),
            ('name = "a"\nsource = "b"\nbatch = 2\nlayers = [{ shape = [3], colour = 1 }]', "colour"),
            ('name = "a"\nsource = "b"\nbatch = 2\nlayers = [{ shape = [3], activation = "tanh" }]', "tanh"),
            ('name = "a"\nsource = "b"\nbatch = 2\nlayers = [{ shape = [3] }]\nlayer = 1', "unknown key 'layer'"),
            ('name = "a"\nsource = "b"\nbatch = 2\nthrough = "x"\nlayers = [{ shape = [3] }]', "through"),
        ],
    )
    def test_a_corrupt_file_is_one_line_and_exit_2(self, tmp_path, text, message):
        (tmp_path / "a.toml").write_text(text)
        result = call("--suite", tmp_path / "a.toml")
        assert (result.exit_code, result.stdout) == (2, "")
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--suite", "resnet51"), "suite must be one of conformer"),
            (("--suite", "no/such.toml"), "No such file"),
            (("--provider", "cudnn"), "provider must be one of copy"),
            (("--layout", "nhwc"), "layout must be one of planar"),
            (("--dtype", "int8"), "dtype must be one of float32"),
            (("--direction", "up"), "direction must be one of forward"),
            (("--outputs", "warm"), "outputs must be one of reused"),
            (("--threads", "0"), "threads must be at least 1"),
            (("--threads", "two"), "whole numbers"),
            (("--model", "vgg"), "model must be one of resnet18"),
            (("--model", "resnet50", "--provider", "onednn"), "provider must be one of eager"),
        ],
    )
    def test_what_is_unknown_is_one_line_and_exit_2(self, arguments, message):
        result = call(*arguments)
        assert result.exit_code == 2
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        assert len(errors) == 1
        assert message in errors[0]


class TestCases:
    DIRECTIONS = ("forward", "backward", "inference", "step")

    def test_every_combination_once(self):
        two = Suite("two", "-", (Layer((2, 3, 4, 4)), Layer((8, 3))))
        found = cases([two], ["planar", "channels_last"], ["float32"], None, ["fresh"], [1, 2])
        assert len(found) == len(set(found)) == (2 + 1) * 3 * 2
        assert {one.layout for one in found if one.layer.shape == (8, 3)} == {"channels_last"}

    def test_two_dimensions_are_measured_in_the_planar_layout_alone_too(self):
        assert len(cases([Suite("mlp", "-", (Layer((8, 3)),))], ["planar"], ["float32"], ["step"], ["fresh"], [1])) == 1

    @pytest.mark.parametrize(
        ("layout", "residual", "activation", "expected"),
        [  # forward, backward, inference, step
            ("planar", False, "relu", (2, 3, 2, 5)),
            ("planar", True, "relu", (3, 5, 3, 8)),
            ("planar", True, None, (3, 4, 3, 7)),
            ("channels_last", False, "relu", (3, 5, 2, 8)),
            ("channels_last", True, "relu", (4, 8, 3, 12)),
        ],
    )
    def test_bytes_that_must_move(self, layout, residual, activation, expected):
        one = case(layer=Layer((2, 3, 4, 4), activation=activation, residual=residual), layout=layout)
        assert tuple(replace(one, direction=d).passes for d in self.DIRECTIONS) == expected

    @pytest.mark.parametrize(
        ("residual", "activation", "expected"),
        [(False, "relu", (2, 3, 2, 4)), (True, "relu", (3, 5, 3, 6)), (True, None, (3, 4, 3, 6))],
    )
    def test_the_copy_moves_as_many_bytes_as_the_tensors_have(self, residual, activation, expected):
        one = case(layer=Layer((2, 3, 4, 4), activation=activation, residual=residual))
        for direction, count in zip(self.DIRECTIONS, expected, strict=True):
            here = replace(one, direction=direction)
            assert here.tensors == count
            (copied,) = find(["copy"])[0].prepare(here, tensors(here))()
            assert 2 * copied.numel() == count * tensors(here).x.numel()

    def test_quick_keeps_four_layers_with_the_largest_and_the_smallest(self):
        sizes = [math.prod(layer.shape) for layer in quick(suite.load("resnet50")).layers]
        every = [math.prod(layer.shape) for layer in suite.load("resnet50").layers]
        assert len(sizes) == 4
        assert (max(sizes), min(sizes)) == (max(every), min(every))

    @pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
    def test_layouts_keep_values(self, shape):
        x = torch.randn(shape)
        last = laid_out(x, "channels_last")
        assert torch.equal(last, x)
        assert last.movedim(1, -1).is_contiguous()
        assert laid_out(last, "planar").is_contiguous()


def test_a_call_is_timed_where_it_runs():
    """On a GPU by another clock, in the same rounds; the first calls warm up."""
    calls = list[str]()
    functions = {name: partial(calls.append, name) for name in ("one", "other")}

    def seconds_of(function):
        function()
        return 2.0 if calls[-1] == "one" else 3.0

    times = iter(range(100))
    found = device.by_events(functions, Effort(4.0, least=2), seconds_of, lambda: next(times))
    assert found == {"one": [2.0] * 5, "other": [3.0] * 5}
    assert calls[: 2 * device.WARM_UP] == ["one"] * device.WARM_UP + ["other"] * device.WARM_UP
    assert len(calls) == 2 * device.WARM_UP + 10


def test_on_a_gpu_the_cache_takes_the_place_of_the_memory_of_outputs():
    layers = [suite.load("tiny")]
    found = cases(layers, ["planar"], ["bfloat16"], ["forward"], ["flushed", "warm"], [1], "cuda")
    assert {each.outputs for each in found} == {"flushed", "warm"}
    assert {each.device for each in found} == {"cuda"}
    with pytest.raises(InputError, match="outputs must be one of flushed, warm"):
        cases(layers, ["planar"], None, None, ["fresh"], [1], "cuda")


def test_a_suite_of_another_batch():
    layers = with_batch(suite.load("resnet50"), 7).layers
    assert {layer.shape[0] for layer in layers} == {7}
    assert [layer.shape[1:] for layer in layers] == [layer.shape[1:] for layer in suite.load("resnet50").layers]


def test_without_a_gpu_the_option_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = call("--device", "cuda")
    assert done.exit_code == 2
    assert "torch finds no GPU here" in done.output
