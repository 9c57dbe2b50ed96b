"""`batchnorm fold` as a person types it: programs and weights out, one-line errors, nothing written when it fails."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner

from batchnorm.cli import commands
from tests.networks import settle

MODULE = """
import torch
from torch import nn
from tests.networks import settle

def model():
    torch.manual_seed(0)
    layers = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid()
    return settle(nn.Sequential(*layers))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)

    def forward(self, x, scale):
        return {"y": self.norm(self.conv(x)) * scale}

def named():
    return {"scale": torch.ones(1, 1, 4), "x": torch.randn(1, 2, 4)}

class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.shape[0] == 2 else x.sum().item() * x
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("mynet", None)
    yield tmp_path
    sys.modules.pop("mynet", None)


def call(*arguments):
    return CliRunner().invoke(commands, ["fold", *map(str, arguments)])


def model():
    import mynet  # pyright: ignore[reportMissingImports]

    return settle(mynet.model()).eval()


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_programs_put_out_what_the_model_does_for_any_batch(folder, suffix):
    out = folder / "new" / f"model{suffix}"
    result = call("mynet:model", "--input", "1x3x6x5", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [(pair["batch_norm"], pair["kind"]) for pair in said["folded"]] == [("0", "before, padded"), ("2", "after")]
    assert list(said["left"]) == ["4"]
    assert max(said["program_error"], said["max_error"]) < 1e-5
    assert list(out.parent.iterdir()) == [out]
    x = torch.randn(5, 3, 6, 5)
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    else:
        found = torch.export.load(out).module()(x)
    torch.testing.assert_close(found, model()(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_in_and_out(folder, suffix):
    source = model()
    source[1].weight.data.mul_(2)
    torch.save(source.state_dict(), "in.pt")
    out = folder / f"out{suffix}"
    result = call("mynet:model", "--input", "2x3x6x5", "--weights", "in.pt", "--out", out)
    assert result.exit_code == 0, result.output
    assert "left: before it is 3, a ReLU; after it is 5, a Sigmoid" in " ".join(result.stdout.split())
    assert "batch norms  3 before, 1 after" in result.stdout
    if suffix == ".pt":
        state = torch.load(out, weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(out)
    assert {"0.value", "1.weight", "1.bias", "4.running_mean"} < set(state)
    scale = source[2].weight / (source[2].running_var + 1e-5).sqrt()
    before = source[0].weight / (source[0].running_var + 1e-5).sqrt()
    wanted = source[1].weight * scale.view(-1, 1, 1, 1) * before.view(-1, 1, 1)
    torch.testing.assert_close(state["1.weight"], wanted)


def test_named_inputs(folder):
    result = call("mynet:Two", "--input", "mynet:named", "--out", "two.pt2", "--fixed-batch", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["batch_norms_after"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mynet:model", "--input", "1x3x6x5", "--out", "model.bin"), "--out must end in one of .pt2, .onnx"),
        (
            ("mynet:model", "--input", "1x2x6x5", "--out", "model.pt"),
            "the model must take the example, but RuntimeError",
        ),
        (("mynet:model", "--input", "mynet:nothing", "--out", "model.pt"), "has no attribute 'nothing'"),
        (("mynet:model", "--input", "mynet", "--out", "model.pt"), "package.module:name"),
        (
            ("mynet:model", "--input", "1x3x6x5", "--out", "out.pt", "--tolerance", "0"),
            "must return what the model returns",
        ),
        (("mynet:Branching", "--input", "2x3", "--out", "out.pt2"), "--fixed-batch"),
    ],
)
def test_errors_are_clear_and_write_nothing(folder, arguments, words):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert [path.name for path in folder.iterdir() if path.suffix in (".pt", ".pt2", ".bin")] == []


ODD = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("[red]conv", nn.Conv2d(3, 4, 1))
        self.add_module("[/norm]", nn.BatchNorm2d(4))
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(torch.relu(getattr(self, "[/norm]")(getattr(self, "[red]conv")(x))))

def model():
    print("building")
    return Odd()
"""


def test_names_with_brackets_are_printed_as_they_are(folder):
    (folder / "odd.py").write_text(ODD)
    sys.modules.pop("odd", None)
    result = call("odd:model", "--input", "1x3x4x4", "--out", "x.pt")
    assert result.exit_code == 0, result.output
    assert "folded into [red]conv (after)" in result.stdout
    assert "[/norm]" in result.stdout


def test_json_is_alone_on_stdout_when_the_factory_prints(folder):
    (folder / "odd.py").write_text(ODD)
    sys.modules.pop("odd", None)
    result = call("odd:model", "--input", "1x3x4x4", "--out", "x.pt", "--json")
    assert json.loads(result.stdout)["folded"][0]["batch_norm"] == "[/norm]"
    assert "building" in result.stderr


@pytest.mark.parametrize("shape", ["99999999999x3x8x8", f"{'9' * 30}x3"])
def test_a_shape_beyond_memory_is_one_line(folder, shape):
    result = call("mynet:model", "--input", shape, "--out", "x.pt")
    assert result.exit_code == 2
    assert "--input must be a shape whose tensor fits in memory" in result.output
    assert "Traceback" not in result.output
