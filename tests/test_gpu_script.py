"""`make gpu` without a GPU: time limits, rows of interrupted checks, verdicts. What its checks measure is not looked at."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from batchnorm.bench.row import Row
from batchnorm.cli import commands
from batchnorm.kernels.gpu import plans
from tests.test_docs import script

pytestmark = pytest.mark.skipif(os.name == "nt", reason="it ends groups of processes")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    loaded = script("scripts/gpu.py")
    monkeypatch.setattr(loaded, "OUT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return loaded


def check(gpu, code: str, seconds: int = 60):
    return gpu.Check("a check", [sys.executable, "-c", code], seconds, {"NAME": "value"})


def test_without_a_gpu_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert "torch finds no GPU" in capsys.readouterr().out


def test_a_check_is_told_in_a_line(gpu):
    later = time.monotonic() + 100
    assert gpu.run(check(gpu, "import os; print('1 passed', os.environ['NAME'])"), later).endswith("1 passed value")
    assert gpu.run(check(gpu, "print('1 failed'); raise SystemExit(3)"), later).startswith("FAILED (3)")
    assert gpu.run(gpu.Check("none", ["/no/such/program"], 60, {}), later).startswith("FAILED: it does not start")
    assert gpu.run(check(gpu, "print()"), time.monotonic() + 1) == "not run: no time was left"


def test_an_interrupted_check_keeps_its_rows_and_leaves_no_process(gpu, tmp_path, monkeypatch):
    """A benchmark writes its rows on Ctrl-C; the processes that it started are ended too."""
    monkeypatch.setattr(gpu, "AT_LEAST", 0.1)
    on_interrupt = f"""echo '{{"rows": [1]}}' > {tmp_path}/model.json; echo interrupted; exit 130"""
    code = f"""trap "{on_interrupt.replace('"', chr(92) + '"')}" INT
sleep 60 & echo $! > {tmp_path}/child
while :; do sleep 0.1; done"""
    said = gpu.run(gpu.Check("a check", ["sh", "-c", code], 2, {}), time.monotonic() + 100)
    assert said == "not finished in 2 s (see a-check.txt): interrupted"
    assert gpu.rows("model") == [1]
    state, late = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat"), time.monotonic() + 20
    while state.exists() and state.read_text().split()[2] not in "ZX":
        assert time.monotonic() < late, "its child still runs"
        time.sleep(0.05)


def test_every_command_is_one_that_there_is(gpu, monkeypatch):
    """Options, files and tests exist; the checks that are always run fit the time."""
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "/usr/bin/compute-sanitizer")
    found = gpu.checks()
    for one in found:
        words = one.command[one.command.index(sys.executable) + 1 :]
        if words[:2] == ["-m", "batchnorm"]:
            given = CliRunner().invoke(commands, [*words[2:], "--help"])
            assert given.exit_code == 0, given.output
            refused = CliRunner().invoke(commands, words[2:])
            assert "torch finds no GPU here" in refused.output
        else:
            assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", "benchmarks/")))
    assert sum(one.seconds for one in found[:6]) <= gpu.SECONDS
    assert len({one.name for one in found}) == len(found)


def made_up(provider: str, time: float, **fields) -> dict:
    """A row of a benchmark on a GPU: a step takes so many milliseconds, where its bytes take 1."""
    words = {each.name: "" for each in dataclasses.fields(Row)}
    given = {
        "suite": "resnet50",
        "case": "function forward",
        "shape": "256x64x56x56",
        "count": 1,
        "epilogue": "BN+relu",
    }
    given |= {
        "layout": "channels_last",
        "dtype": "bfloat16",
        "direction": "forward",
        "outputs": "flushed",
        "threads": 1,
    }
    given |= {"provider": provider, "unit": "ms", "p20": time, "p50": time, "p80": time, "tensor_bytes": 2**27}
    return {**words, **given, "limit": 1.0, "ratio_to_limit": time, "ratio_to_eager": 3.0 / time, **fields}


def write_rows(folder: Path, **files: list[dict]) -> None:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))


def test_verdicts_of_made_up_rows(gpu, tmp_path):
    assert gpu.verdicts() == [
        f"| {what} | no row was written | not measured |"
        for what in ("layers of ResNet-50", "against torch.compile", "step of ResNet-50", "from which size on")
    ]
    sizes = [
        {"megabytes": size, "provider": name, "host_us": host, "step_us": 0.0, "device_us": device * size}
        for size in (16, 32, 64)
        for name, host, device in (("ours", 250.0, 2.0), ("eager", 60.0, 2.5))
    ]
    step = {"case": "function step", "direction": "step", "epilogue": "BN+add+relu"}
    write_rows(
        tmp_path,
        resnet50=[made_up("ours", 1.1), made_up("eager", 3.0)],
        compile=[made_up("ours", 1.5, **step), made_up("compile", 1.6, **step)],
        model=[made_up("ours", 100.0, ratio_to_eager=1.05), made_up("fused", 90.0, ratio_to_eager=1.2)],
        threshold=sizes,
    )
    assert gpu.verdicts() == [
        "| forward, channels_last, BN+relu, flushed | 1.10 of its bytes, 2.73x of eager; worst 2.73 | held |",
        "| step, channels_last, BN+add+relu, flushed | 1.50 of its bytes, 1.07x of compile; worst 1.07 | missed |",
        "| step of ResNet-50, ours | 1.05x of eager | missed |",
        "| step of ResNet-50, fused | 1.20x of eager | held |",
        "| from which size on | the programs pay off from 32 MB on | the table says 32 MB |",
    ]


def test_rows_that_were_cut_off_do_not_cost_the_rest(gpu, tmp_path):
    (tmp_path / "model.json").write_text('{"rows": [{"provider": "ou')
    write_rows(tmp_path, resnet50=[{"of": "another version"}])
    text = gpu.page(["| kernels on the device | passed in 3 s |"])
    assert "| kernels on the device | passed in 3 s |" in text
    assert "| the rows cannot be summarized | TypeError" in text


def test_all_of_it_with_checks_that_need_no_gpu(gpu, tmp_path, monkeypatch, capsys):
    (tmp_path / "resnet50.json").write_text("of a run before")
    one, other = (
        check(gpu, code)._replace(name=name) for name, code in (("one", "print(7)"), ("two", "raise OSError"))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "checks", lambda: [one, other])
    assert gpu.main() == 1
    text = (tmp_path / "verdict.md").read_text()
    assert text in capsys.readouterr().out
    assert "| one | passed in 0 s: 7 |" in text
    assert "| two | FAILED (1) in 0 s: OSError |" in text
    assert not (tmp_path / "resnet50.json").exists()


def test_where_the_programs_begin_to_pay_off(gpu, monkeypatch):
    """The arithmetic on made-up rows, and the measurement itself on a CPU."""
    threshold = script("benchmarks/gpu_threshold.py")
    monkeypatch.delenv(plans.LEAST)  # which the script has set
    rows = threshold.measure(0.2, "cpu", 2)
    assert [row["provider"] for row in rows] == ["ours", "eager"]
    assert all(row["host_us"] > 0 and row["step_us"] > 0 and row["device_us"] is None for row in rows)
    slow = [
        {"megabytes": size, "provider": name, "host_us": 10.0, "device_us": device}
        for size in (1, 2)
        for name, device in (("ours", 9.0), ("eager", 8.0))
    ]
    assert threshold.verdict(slow) == "the programs pay off at no size"
