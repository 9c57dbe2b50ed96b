"""`batchnorm convert` as a person types it: the plan as a tree, weights in and out, one-line errors."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import batchnorm as bn
from batchnorm.cli import commands
from tests.networks import settle

MODULE = """
import torch
from torch import nn
from batchnorm.lab.networks import Bottleneck
from tests.networks import FrozenBatchNorm2d

class Mine(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2

def model():
    tail = nn.Sequential(nn.Conv2d(16, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), Mine(3), FrozenBatchNorm2d(3))
    return nn.Sequential(nn.Conv2d(3, 4, 1), Bottleneck(4, 4, 1), tail)

def layer():
    return nn.BatchNorm1d(3)

def loader():
    return [torch.zeros(4, 3)]

def plain():
    return nn.Linear(3, 3)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "120")
    sys.modules.pop("mynet", None)
    yield tmp_path
    sys.modules.pop("mynet", None)


def call(*arguments, **options):
    return CliRunner().invoke(commands, ["convert", *map(str, arguments)], **options)


def test_the_plan_is_a_tree(folder):
    result = call("mynet:model", "--fuse", "--out", "new.pt", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines == [
        "mynet:model  Sequential",
        "├── 1  Bottleneck → calls its batch norms with fused operations",
        "│   ├── body  Sequential",
        "│   │   ├── 1  BatchNorm2d → batchnorm.BatchNorm2d, applies relu",
        "│   │   ├── 4  BatchNorm2d → batchnorm.BatchNorm2d, applies relu",
        "│   │   └── 7  BatchNorm2d → batchnorm.BatchNorm2d, applies an addition and relu",
        "│   └── shortcut  Sequential",
        "│       └── 1  BatchNorm2d → batchnorm.BatchNorm2d",
        "└── 2  Sequential",
        "    ├── 1  BatchNorm2d → batchnorm.BatchNorm2d, applies relu",
        "    ├── 3  Mine  left: it is a Mine, which computes something else",
        "    └── 4  FrozenBatchNorm2d → batchnorm.FrozenBatchNorm",
        "",
        "7 of 8 change.",
    ]
    assert not (folder / "new.pt").exists()
    assert call("mynet:plain").stdout.split("\n\n")[1] == "It has no batch norm.\n"
    assert "mynet:layer  BatchNorm1d → batchnorm.BatchNorm1d" in call("mynet:layer").stdout


def test_json_is_plain_data():
    said = json.loads(call("mynet:model", "--json").stdout)
    assert said["out"] is None
    assert {row["module"]: (row["is"], row["becomes"], row["left"]) for row in said["modules"]}["2.3"] == (
        "Mine", None, "it is a Mine, which computes something else",
    )  # fmt: skip


def test_names_of_a_tutorial_become_torchs(folder):
    state = settle(nn.BatchNorm1d(3)).state_dict()
    torch.save(
        {
            "gamma": state["weight"],
            "beta": state["bias"],
            "running_mean": state["running_mean"],
            "running_var": state["running_var"],
        },
        "old.pt",
    )
    result = call("mynet:layer", "--weights", "old.pt", "--out", "new/new.pt")
    assert result.exit_code == 0, result.output
    assert "Wrote new/new.pt" in result.stdout
    layer = nn.BatchNorm1d(3)
    layer.load_state_dict(torch.load("new/new.pt", weights_only=True))
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)


def test_layers_written_by_hand_are_left_with_the_way_to_take_them_over(folder):
    (folder / "byhand.py").write_text(
        "from torch import nn\nfrom tests.test_interop import Tutorial\ndef model():\n    layer = Tutorial(3)\n"
        "    return nn.Sequential(nn.Linear(3, 3), layer, nn.ReLU(), layer)\n"
    )
    sys.modules.pop("byhand", None)
    result = call("byhand:model")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.replace("│", " ").split())
    assert "1 Tutorial left: it is a batch norm written by hand (Tutorial with gamma, beta, running_mean," in said
    assert "batchnorm.interop.from_tutorial(layer)" in said
    assert said.endswith("0 of 1 change.")
    rows = json.loads(call("byhand:model", "--json").stdout)["modules"]
    assert [(row["module"], row["becomes"]) for row in rows] == [("1", None), ("3", None)]
    result = CliRunner().invoke(commands, ["recalibrate", "byhand:model", "--data", "mynet:loader", "--out", "x.pt"])
    assert result.exit_code == 2
    assert "but has none; of 1: it is a batch norm written by hand" in result.stderr
    assert not (folder / "x.pt").exists()


def test_a_file_that_exists_is_written_over_by_force_only(folder):
    (folder / "new.pt").write_text("precious")
    refused = call("mynet:layer", "--out", "new.pt")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "--out must not exist yet, but new.pt does" in refused.stderr
    assert call("mynet:layer", "--out", "new.pt", "--dry-run").exit_code == 0
    assert (folder / "new.pt").read_text() == "precious"
    assert call("mynet:layer", "--out", "new.pt", "--force", "--json").exit_code == 0
    assert sorted(torch.load("new.pt")) == sorted(bn.BatchNorm1d(3).state_dict())


ODD = """
from torch import nn

def model():
    print("building")
    norm = nn.BatchNorm2d(3)
    return nn.ModuleDict({"[/batch]": norm, "[red]x": norm})
"""


def test_names_with_brackets_and_a_layer_that_hangs_twice(folder):
    (folder / "odd.py").write_text(ODD)
    sys.modules.pop("odd", None)
    result = call("odd:model")
    assert result.exit_code == 0, result.output
    assert "[/batch]  BatchNorm2d → batchnorm.BatchNorm2d" in result.stdout
    assert "[red]x  BatchNorm2d" in result.stdout
    assert result.stdout.rstrip().endswith("1 of 1 change.")
    result = call("odd:model", "--json")
    assert [row["module"] for row in json.loads(result.stdout)["modules"]] == ["[/batch]", "[red]x"]
    assert "building" in result.stderr


def test_an_empty_name_of_a_file_is_a_usage_error():
    result = call("mynet:model", "--out", "")
    assert result.exit_code == 2
    assert "--out must be a file, but . is a folder" in result.output


def test_alternatives_to_batch_norm(folder):
    result = call("mynet:model", "--to", "group", "--channels-per-group", "4", "--out", "group.pt")
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[1:14] == [
        "├── 1  Bottleneck",
        "│   ├── body  Sequential",
        "│   │   ├── 1  BatchNorm2d → torch.nn.GroupNorm, 1 group of 4",
        "│   │   ├── 4  BatchNorm2d → torch.nn.GroupNorm, 1 group of 4",
        "│   │   └── 7  BatchNorm2d → torch.nn.GroupNorm, 4 groups of 4",
        "│   └── shortcut  Sequential",
        "│       └── 1  BatchNorm2d → torch.nn.GroupNorm, 4 groups of 4",
        "└── 2  Sequential",
        "    ├── 1  BatchNorm2d  left: it has 3 channels, fewer than a group of 4; pass a smaller channels_per_group, or",
        "    │   to='layer'",
        "    ├── 3  Mine  left: it is a Mine, which computes something else",
        "    └── 4  FrozenBatchNorm2d  left: it is frozen, so it does not depend on the batch",
        "",
    ]
    assert "4 of 7 change." in result.stdout
    assert not any(".running" in name and name[0] == "1" for name in torch.load("group.pt", weights_only=True))
    rows = json.loads(call("mynet:layer", "--to", "none", "--json").stdout)["modules"]
    assert rows == [{"module": "", "is": "BatchNorm1d", "becomes": "its weight and bias alone", "left": None}]
    assert "InstanceNorm2d" in call("mynet:model", "--to", "instance", "--standardize-weights").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "group", "--fuse"), "--to leaves no batch norms that --fuse could fuse"),
        (("--standardize-weights",), "--standardize-weights needs --to"),
        (("--to", "batch"), "'batch' is not one of 'group', 'layer', 'instance', 'none'"),
        (("--to", "group", "--channels-per-group", "1"), "1 is not in the range x>=2"),
    ],
)
def test_alternatives_with_wrong_options(options, message):
    result = call("mynet:model", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
