"""`batchnorm recalibrate` as a person types it: files in and out, one-line errors, nothing written when it fails."""

import json
import pickle
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import batchnorm as bn
from batchnorm.cli import commands

MODULE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))

def loader():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, generator=generator) + 2, 0) for _ in range(20)]

def dicts():
    return [{"image": {"pixels": x}} for x, _ in loader()]

def forward(model, item):
    return model(item["image"]["pixels"])

def interrupted():
    yield from loader()
    raise KeyboardInterrupt

def failing():
    raise OSError("no disk")

def plain():
    return nn.Linear(3, 3)

number = 3
"""


@pytest.fixture
def folder(importable):
    return importable("mynet", MODULE)


def call(*arguments):
    return CliRunner().invoke(commands, ["recalibrate", *map(str, arguments)])


def trained():
    import mynet  # pyright: ignore[reportMissingImports]

    model = mynet.model()
    with torch.no_grad():
        model[0].weight.mul_(3)
    return model, mynet.loader()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("method", ["joint", "layerwise"])
def test_weights_in_weights_out(folder, suffix, method):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    sys.path.insert(0, str(folder))
    model, loader = trained()
    torch.save(model.state_dict(), "in.pt")
    out = folder / "new" / f"out{suffix}"
    result = call(
        "mynet:model",
        "--data",
        "mynet:loader",
        "--weights",
        "in.pt",
        "--out",
        out,
        "--method",
        method,
        "--limit",
        7,
        "--json",
    )
    assert result.exit_code == 0, result.output
    bn.recalibrate(model, loader, method=method, limit=7)
    if suffix == ".pt":
        found = torch.load(out, weights_only=True)
    else:
        from safetensors.torch import load_file

        found = load_file(out)
    torch.testing.assert_close(found, dict(model.state_dict()), rtol=0, atol=0)
    assert list(out.parent.iterdir()) == [out]
    said = json.loads(result.stdout)
    assert (said["passes"], said["batches"]) == (1 if method == "joint" else 2, 7)
    layer = said["layers"][0]
    assert layer["layer"] == "1"
    shift = (model[1].running_mean / model[1].running_var.sqrt()).abs().max()  # from 0
    assert layer["mean_shift"] == pytest.approx(shift.item(), rel=1e-5)
    again = call("mynet:model", "--data", "mynet:loader", "--weights", out, "--out", folder / "again.pt", "--limit", 7)
    assert again.exit_code == 0, again.output
    assert "0 deviations" in again.stdout
    assert "× 1\n" in "".join(line.rstrip() + "\n" for line in again.stdout.splitlines())
    assert "Wrote" in again.stdout


def test_own_forward(folder):
    arguments = ("mynet:model", "--data", "mynet:dicts", "--out", "out.pt")
    result = call(*arguments, "--forward", "mynet:forward")
    assert result.exit_code == 0, result.output
    assert call("mynet:model", "--data", "mynet:loader", "--out", "wanted.pt").exit_code == 0
    torch.testing.assert_close(torch.load("out.pt"), torch.load("wanted.pt"), rtol=0, atol=0)
    without = call(*arguments, "--force")
    assert without.exit_code == 2
    assert "--forward" in without.stderr


def test_ctrl_c_writes_nothing(folder):
    result = call("mynet:model", "--data", "mynet:interrupted", "--out", "out.pt")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    assert not (folder / "out.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mynet", "--data", "mynet:loader"), "package.module:name"),
        (("nonet:model", "--data", "mynet:loader"), "ModuleNotFoundError: No module named 'nonet'"),
        (("mynet:nothing", "--data", "mynet:loader"), "has no attribute 'nothing'"),
        (("mynet:failing", "--data", "mynet:loader"), "raised OSError: no disk"),
        (("mynet:loader", "--data", "mynet:loader"), "must return a torch.nn.Module, but returned list"),
        (("mynet:model", "--data", "mynet:number"), "must return a loader of batches, but returned int"),
        (("mynet:plain", "--data", "mynet:loader"), "must have a batch norm"),
        (("mynet:model", "--data", "mynet:loader", "--weights", "missing.pt"), "cannot read missing.pt"),
        (("mynet:model", "--data", "mynet:loader", "--weights", "code.pt"), "contain only tensors"),
        (("mynet:model", "--data", "mynet:loader", "--weights", "text.pt"), "must be a state_dict"),
        (("mynet:model", "--data", "mynet:loader", "--weights", "whole.pt"), "but contains epoch, model"),
        (("mynet:model", "--data", "mynet:loader", "--weights", "other.pt"), "must fit the model"),
        (("mynet:model", "--data", "mynet:loader", "--method", "layerwise", "--limit", "0"), "--limit"),
        (("mynet:model", "--data", "mynet:interrupted", "--method", "layerwise"), "only once"),
    ],
)
def test_errors_are_clear_and_write_nothing(folder, arguments, words):
    (folder / "code.pt").write_bytes(pickle.dumps(nn.ReLU, protocol=2))
    (folder / "text.pt").write_text("hello")
    torch.save({"epoch": 3, "model": {}}, "whole.pt")
    torch.save(nn.Linear(2, 2).state_dict(), "other.pt")
    result = call(*arguments, "--out", "out.pt")
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not (folder / "out.pt").exists()


def test_a_place_that_cannot_be_written_shows_before_the_work(folder):
    (folder / "file").write_text("")
    result = call("mynet:model", "--data", "mynet:interrupted", "--out", "file/out.pt")
    assert result.exit_code == 2
    assert "cannot write into file" in result.stderr
