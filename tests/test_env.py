"""`batchnorm env` says what runs, and it says the truth: it asks the kernels themselves."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from batchnorm import env, kernels
from batchnorm.cli import commands
from batchnorm.cli import env as command
from batchnorm.kernels import eager


class Picky:
    """A kernel that takes float32 without a mask."""

    name = "picky"

    @staticmethod
    def status():
        return "it takes little"

    @staticmethod
    def refuses(x, epilogue, plain=True):
        if x.dtype != torch.float32:
            return f"x is {x.dtype}"
        return None if epilogue.mask is None else "there is a mask"


@pytest.fixture
def picky(monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", (Picky, eager))


def call(*arguments):
    return CliRunner().invoke(commands, ["env", *arguments])


def test_choices_are_those_of_the_kernels(picky):
    assert env.choice("cpu", torch.float32, "planar", masked=False).kernel == "picky"
    refused = env.choice("cpu", torch.bfloat16, "planar", masked=False)
    assert (refused.kernel, refused.refusals) == ("eager", {"picky": "x is torch.bfloat16"})
    assert env.choice("cpu", torch.float32, "channels_last", masked=True).refusals == {"picky": "there is a mask"}


def test_kernels_tell_how_they_run(monkeypatch):
    monkeypatch.setattr(kernels.cpu, "_library", kernels.cpu._Library(None, "AVX2", ("AVX2", "baseline")))
    found = env.environment().kernels
    assert list(found) == [kernel.name for kernel in kernels.KERNELS]
    assert found["cpu"] == "C++, AVX2 (built for AVX2, baseline)"
    assert found["eager"] == "torch's operators, for every call"
    monkeypatch.setattr(kernels.cpu, "_library", kernels.cpu._Library("the C++ kernels were not built"))
    assert env.environment().kernels["cpu"] == "the C++ kernels were not built"


def test_every_kind_of_input_is_asked_about():
    found = {(one.device, one.dtype, one.layout, one.epilogue) for one in env.choices() if one.device == "cpu"}
    assert len(found) == 4 * 3 * 2


def test_inputs_lie_as_they_are_named(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "select", lambda x, epilogue: seen.append(x) or eager)
    for layout in ("planar", "channels_last", "strided"):
        env.choice("cpu", torch.float32, layout, masked=False)
    assert [x.is_contiguous() for x in seen] == [True, False, True]  # on the CPU a strided input is copied
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [False, True, False]


def test_the_table_says_why(picky):
    result = call()
    assert result.exit_code == 0, result.output
    assert "picky: there is a mask" in " ".join(result.stdout.split())
    assert "it takes little" in result.stdout
    assert torch.__version__ in result.stdout


def test_json_is_whole():
    result = call("--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found == env.environment().to_dict()
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["cores"] >= 1


@pytest.mark.slow
def test_the_clone_is_measured_if_asked(monkeypatch):
    measure = command.measure_clone
    monkeypatch.setattr(command, "measure_clone", lambda: measure(numel=1000, processes=1, clones=1))
    assert json.loads(call("--measure", "--json").stdout)["clone"]["bytes"] == 4000
    assert "times faster" in call("--measure").stdout


@pytest.mark.parametrize(
    ("text", "setting"), [("always [madvise] never", "madvise"), ("[always] madvise never", "always")]
)
def test_huge_pages(monkeypatch, tmp_path, text, setting):
    (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(env, "HUGE_PAGES", tmp_path / "enabled")
    assert env.huge_pages() == setting
    monkeypatch.setattr(env, "HUGE_PAGES", tmp_path / "none")
    assert env.huge_pages() == "unknown"


def test_advice_is_given_where_it_helps():
    assert "THP_MEM_ALLOC_ENABLE=1" in env.advice("madvise", allowed=False)[0]
    assert env.advice("madvise", allowed=True) == env.advice("always", allowed=False) == []
    assert "root" in env.advice("never", allowed=False)[0]


def test_a_processor_has_a_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("model name\t: Fast One\ncpu family\t: 6\nmodel\t\t: 7\n\nmodel name\t: Second\n")
    assert env._cpu(tmp_path / "cpuinfo") == "Fast One (family 6, model 7)"
    (tmp_path / "cpuinfo").write_text("Features: none")
    assert env._cpu(tmp_path / "cpuinfo")
    assert env._cpu(tmp_path / "nothing")


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "2.14.0a0+git1"])
def test_a_tested_torch_needs_no_advice(version):
    assert env.torch_advice(version) == []


@pytest.mark.parametrize(
    ("version", "says"),
    [("2.15.0", "newer than the newest"), ("3.0.0.dev20270101", "newer"), ("2.10.1", "older"), ("1.13.1", "older")],
)
def test_another_torch_is_named(version, says):
    (line,) = env.torch_advice(version)
    assert says in line
    assert version in line
    assert "pip install" in line


def test_what_is_tested_is_what_the_files_say():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == [f"torch>={env.TESTED[0]}"]
    usual, newest = (
        (root / name).read_text(encoding="utf-8").splitlines()
        for name in ("constraints.txt", f"constraints-{env.TESTED[1]}.txt")
    )
    (torchs,) = set(newest) - set(usual)  # everything else is the same
    assert torchs.startswith(f"torch=={env.TESTED[1]}.")
    assert len(newest) == len(usual)


def test_the_torch_that_runs_here_is_a_tested_one():
    assert env.torch_advice(torch.__version__) == [], "raise env.TESTED once all tests pass on a newer torch"
