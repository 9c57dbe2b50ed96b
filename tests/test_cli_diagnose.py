"""`batchnorm diagnose` as a person types it: exit codes, files, one-line errors."""

import json
import pickle

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from batchnorm.cli import commands
from batchnorm.diagnostics import RULES

MODULE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

def lagging():
    sick = model()
    sick[1].running_mean.fill_(5.0)
    return sick

def loader():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 3, generator=generator) + 2, torch.zeros(32, dtype=torch.long)) for _ in range(8)]

def dicts():
    return [{"image": {"pixels": x}} for x, _ in loader()]

def forward(model, item):
    return model(item["image"]["pixels"])

def objective(model, item):
    return forward(model, item).square().mean()

def optimizer(model):
    return torch.optim.SGD(model.parameters(), 0.01, weight_decay=0.1)

def predict(model, x):
    return model(x)

def validate(model):
    model(loader()[0][0])

def step(model, item):
    model.train()
    model(item[0]).sum().backward()

def failing():
    yield from loader()[:3]
    raise OSError("no disk")

def interrupted():
    yield from loader()[:3]
    raise KeyboardInterrupt
"""


@pytest.fixture(autouse=True)
def folder(importable):
    return importable("sicknet", MODULE)


def call(*arguments):
    return CliRunner().invoke(commands, ["diagnose", *map(str, arguments)])


def test_nothing_found_exits_with_0():
    done = call("sicknet:model")
    assert done.exit_code == 0
    assert "nothing found in 1 batch norm" in done.output
    assert "pass --data and --predict to ask BN301" in done.output
    assert "replicas" not in done.output


def test_an_error_exits_with_1_and_names_the_layer():
    done = call("sicknet:lagging", "--data", "sicknet:loader", "--criterion", "torch.nn:CrossEntropyLoss")
    assert done.exit_code == 1
    assert "BN201" in done.output
    assert "loss_after" in done.output


def test_a_warning_or_note_exits_with_0():
    done = call("sicknet:model", "--optimizer", "sicknet:optimizer")
    assert (done.exit_code, "BN802" in done.output) == (0, True)


def test_every_option_reaches_its_rule():
    options = ("predict", "validate", "step", "optimizer")
    done = call(
        "sicknet:model",
        "--data",
        "sicknet:loader",
        "--json",
        "-",
        *(word for name in options for word in (f"--{name}", f"sicknet:{name}")),
    )
    data = json.loads(done.stdout)
    assert {"BN301", "BN303", "BN802"} <= {each["code"] for each in data["findings"]}
    done = call("sicknet:lagging", "--twin", "sicknet:model", "--select", "BN6", "--json", "-")
    assert [each["code"] for each in json.loads(done.stdout)["findings"]] == ["BN601"]
    done = call(
        "sicknet:lagging",
        "--data",
        "sicknet:dicts",
        "--forward",
        "sicknet:forward",
        "--objective",
        "sicknet:objective",
        "--json",
        "-",
    )
    assert "loss_before" in json.loads(done.stdout)["findings"][0]["evidence"]


def test_files(folder):
    done = call(
        "sicknet:lagging", "--data", "sicknet:loader", "--html", "d.html", "--json", "d.json", "--sarif", "d.sarif"
    )
    assert done.exit_code == 1
    assert "BN201" in (folder / "d.html").read_text()
    assert json.loads((folder / "d.json").read_text())["findings"]
    assert json.loads((folder / "d.sarif").read_text())["runs"][0]["results"]
    assert "--force" in call("sicknet:model", "--html", "d.html").output


def test_fix_writes_weights_that_are_healthy(folder):
    done = call("sicknet:lagging", "--data", "sicknet:loader", "--fix", "--out", "new.pt")
    assert done.exit_code == 0, done.output
    assert "did BN201" in done.output
    again = call("sicknet:lagging", "--weights", "new.pt", "--data", "sicknet:loader")
    assert again.exit_code == 0
    assert (
        torch.load(folder / "new.pt", weights_only=True).keys()
        == nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).state_dict().keys()
    )


def test_list_and_explain():
    listed = call("--list").output
    assert all(rule.code in listed for rule in RULES)
    explained = " ".join(call("--explain", "bn201").output.split())
    assert "Kullback-Leibler" in explained
    assert "bn.recalibrate(model, loader)" in explained


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "MODEL must name a factory"),
        (("sicknet:nothing",), "must be importable"),
        (("sicknet:model", "--select", "XX"), "a code must be"),
        (("--explain", "BN999"), "must be the code of a rule"),
        (("sicknet:model", "--fix"), "--fix needs --data"),
        (("sicknet:model", "--out", "x.pt"), "--fix needs --data"),
        (("sicknet:model", "--data", "sicknet:failing"), "no disk"),
        (("sicknet:model", "--data", "sicknet:dicts"), "--forward"),
    ],
)
def test_bad_usage_is_one_line(arguments, says, folder):
    done = call(*arguments)
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output
    assert not (folder / "x.pt").exists()


def test_ctrl_c():
    assert call("sicknet:model", "--data", "sicknet:interrupted").exit_code == 130


def test_a_malicious_pickle_is_not_run(folder):
    class Evil:
        def __reduce__(self):
            return (exec, ("open('pwned', 'w')",))

    (folder / "evil.pt").write_bytes(pickle.dumps(Evil()))
    assert call("sicknet:model", "--weights", "evil.pt").exit_code == 2
    assert not (folder / "pwned").exists()
