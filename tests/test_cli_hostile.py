"""Every command that reads a file, given files that are damaged or of another kind; hostile names; a stdout of few characters.

Whatever a file holds, a command ends without a traceback, with one line on stderr and exit code 2.
"""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import wave
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import batchnorm
from batchnorm.bench.row import load as load_rows
from batchnorm.cli import commands
from batchnorm.cli.text import one_line, visible
from batchnorm.errors import InputError
from batchnorm.lab import experiments, result
from batchnorm.lab.data import idx, speech
from batchnorm.lab.runner import stored
from batchnorm.lab.unit import packed, unpacked
from tests.idx_files import write_idx_files

SOURCE = Path(batchnorm.__file__).parents[1]
MODULE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

def loader():
    return [torch.arange(24.0).view(8, 3).sin()]

def extra():
    from tests.test_cli_hostile import Extra, layers
    return layers(Extra)

def stateless():
    from tests.test_cli_hostile import Stateless, layers
    return layers(Stateless)

def locked():
    from tests.test_cli_hostile import Locked, layers
    return layers(Locked)

def leaving():
    raise SystemExit(3)

def lazy():
    print("building")
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
"""
OUT = {"convert": [], "fold": ["--input", "2x3"], "recalibrate": ["--data", "hostile_net:loader"]}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "hostile_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    sys.modules.pop("hostile_net", None)
    yield tmp_path
    sys.modules.pop("hostile_net", None)


class Extra(nn.Sequential):
    def get_extra_state(self):
        return {"a": 1}


class Stateless(nn.Sequential):
    def state_dict(self, *_, **__):
        raise ValueError("no state")


class Locked(nn.Sequential):
    def __deepcopy__(self, memo):
        raise TypeError("cannot copy a lock")


def layers(cls):
    return cls(nn.Linear(3, 4), nn.BatchNorm1d(4))


def call(*arguments, **options):
    return CliRunner(**options).invoke(commands, [str(argument) for argument in arguments])


def assert_refused(result, what):
    """One line on stderr, exit code 2, and no exception but click's own."""
    assert isinstance(result.exception, SystemExit), f"{what}: {result.exception!r}"
    assert result.exit_code == 2, f"{what}: {result.output}"
    lines = result.stderr.splitlines()
    assert len(lines) == 1, f"{what}: {lines}"
    assert lines[0].startswith("Error: "), what
    assert lines[0].isprintable(), what
    assert len(lines[0]) < 2000, what
    assert not result.stdout, what


def damaged(content, draw, count):
    """Variants of a file: cut, with changed, inserted and doubled bytes."""
    for _ in range(count):
        at, data = draw.randrange(len(content)), bytearray(content)
        kind = draw.randrange(4)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            for _ in range(draw.choice((1, 8, 64))):
                data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind == 2:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 100)))
        else:
            data[at:at] = data[: draw.randrange(len(data))]
        yield bytes(data)


def garbage(draw):
    """Files of no format, or of another one."""
    yield from (b"", b"\0", b"PK\3\4", b"PK\5\6" + bytes(18), b"{}", b"[]", b"null", b"\x80\2.", b"\xff\xfe{\0}\0")
    yield from (draw.randbytes(size) for size in (1, 7, 8, 9, 100, 5000))
    yield from (b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"1e999", b"NaN", b'"\\ud800"')
    yield struct.pack("<Q", 2**63) + b"{}"  # a safetensors header of that many bytes
    yield struct.pack("<Q", 2) + b"[]"
    yield pickle.dumps({"a": 1})
    yield b"\x80\2" + b"(" * 50_000 + b"."
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\2}.")
        file.writestr("archive/version", b"3")
    yield archive.getvalue()


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def state_dicts():
    """What `torch.save` writes, but is no state_dict of the model."""
    good = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    nested = []
    for _ in range(200):
        nested = [nested]
    yield from (
        [],
        None,
        3,
        torch.ones(2),
        nested,
        {},
        {1: torch.ones(2)},
        {**good, 1: torch.ones(2)},
        {**good, None: None},
    )
    yield from (
        {**good, ("0", "weight"): torch.ones(4, 3)},
        {**good, b"0.weight": torch.ones(4, 3)},
        {"0.weight": "text"},
    )
    yield {f"[/red]\x1b[31m\n{number}": torch.ones(1) for number in range(500)}
    yield {**good, "0.weight": torch.ones(4, 3).to_sparse()}
    yield {**good, "0.weight": torch.ones(3, 4)}
    yield {**good, "1.running_mean": torch.empty(0)}
    yield {**good, "1.weight": torch.empty(4, device="meta")}
    yield {"model": good, "epoch": 3}


@pytest.mark.parametrize("command", OUT)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_weights(command, suffix, folder):
    draw = random.Random(f"{command}{suffix}")
    path, good = folder / f"in{suffix}", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    arguments = (command, "hostile_net:model", *OUT[command], "--weights", path, "--out", "out.pt", "--force")
    if suffix == ".safetensors":
        from safetensors.torch import save

        others, whole = [save({"other": torch.ones(2)}), saved(good)], save(good)
    else:
        others, whole = [saved(value) for value in state_dicts()], saved(good)
    path.write_bytes(whole)
    assert call(*arguments).exit_code == 0
    for number, content in enumerate([*garbage(draw), *others]):
        path.write_bytes(content)
        assert_refused(call(*arguments), f"file {number}, {content[:40]!r}")
    for number, content in enumerate(damaged(whole, draw, 12)):  # which may be as good as whole
        path.write_bytes(content)
        result = call(*arguments)
        if result.exit_code:
            assert_refused(result, f"damage {number}")
    path.unlink()
    assert_refused(call(*arguments), "no file")
    path.mkdir()
    assert_refused(call(*arguments), "a folder")


@pytest.mark.parametrize("command", OUT)
@pytest.mark.parametrize(
    ("factory", "out", "words"),
    [
        ("extra", "out.safetensors", "_extra_state; write it with another suffix"),
        ("stateless", "out.pt", "ValueError: no state"),
        ("leaving", "out.pt", "raised SystemExit: 3"),
    ],
)
def test_models_that_do_not_fit(command, factory, out, words, folder):
    result = call(command, f"hostile_net:{factory}", *OUT[command], "--out", out)
    assert_refused(result, factory)
    assert words in result.stderr
    assert not (folder / out).exists()


def test_a_model_that_cannot_be_copied():
    result = call("convert", "hostile_net:locked")
    assert_refused(result, "a lock")
    assert "cannot copy a lock" in result.stderr


def test_lazy_layers_and_what_a_factory_prints(folder):
    result = call("recalibrate", "hostile_net:lazy", *OUT["recalibrate"], "--out", "out.pt", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    printed, error = result.stderr.splitlines()
    assert printed == "building"
    assert "a lazy layer must have had its first input" in error


OUTCOME = {
    "schema": 1, "experiment": "depth", "size": "default", "device": "cpu", "data": None, "by_arm": {"a": [None]}, "seconds": 1.0,
    "environment": {"date": "today"}, "command": "batchnorm lab run depth",
}  # fmt: skip
WRONG = [None, True, -1, 10**400, 1e308, "", "text", "\ud800", [], [[]], {}, {"a": None}, {"a": {"b": []}}]


def mutations(data, draw, count):
    """JSON in which values at random places are of another type, missing, or without bounds."""
    for _ in range(count):
        copy = json.loads(json.dumps(data))
        for _ in range(draw.choice((1, 1, 2))):
            place = copy
            while True:
                keys = list(place) if isinstance(place, dict) else range(len(place))
                key = draw.choice(list(keys))
                below = place[key]
                if not isinstance(below, dict | list) or not below or draw.random() < 0.4:
                    break
                place = below
            if isinstance(place, dict) and draw.random() < 0.2 and len(place) > 1:
                del place[key]
            else:
                place[key] = draw.choice(WRONG)
        yield json.dumps(copy).encode()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # matplotlib's, of an axis up to 1e308
def test_outcomes_of_the_lab(folder, monkeypatch):
    """What cannot be read is a warning of one line, and hides no other result; without any there is no page."""
    draw, path = random.Random(0), folder / "depth.json"
    depth = experiments.load("depth")
    monkeypatch.setattr(experiments, "NAMES", ("depth",))
    monkeypatch.setattr(experiments, "load", lambda _: depth)
    measured = {"values": dict.fromkeys(depth.metrics, 0.5), "curves": {"a curve": [[0.0, 1.0], [1.0, "nan"]]}}
    several = {**OUTCOME, "by_arm": {arm: [measured, measured] for arm in depth.arms}}
    path.write_text(json.dumps(several))
    assert call("lab", "list", "--out", folder).stderr == ""
    wrong = [
        {**several, "by_arm": {**several["by_arm"], "batch_norm": [json.loads(each), None]}}
        for each in mutations(measured, draw, 150)
    ]
    contents = [*garbage(draw), *mutations(several, draw, 100), *(json.dumps(each).encode() for each in wrong)]
    for number, content in enumerate(contents):
        path.write_bytes(content)
        pages = (("report", "--page", "page.html"), ("findings", "--page", "page.md"))
        for arguments in (("list",), pages[number % 2] + ("--force",)):
            result = call("lab", *arguments, "--out", folder)
            what = f"{arguments[0]} of file {number}, {content[:300]!r}"
            assert result.exception is None or isinstance(result.exception, SystemExit), f"{what}: {result.exception!r}"
            assert result.exit_code in (0, 2), f"{what}: {result.output}"
            assert all(
                line.startswith(("Warning: ", "Error: ")) and line.isprintable() for line in result.stderr.splitlines()
            )
            assert len(result.stderr.splitlines()) <= 2, f"{what}: {result.stderr}"
    path.unlink()
    path.mkdir()
    assert call("lab", "list", "--out", folder).exit_code == 0
    assert_refused(call("lab", "report", "--out", "hostile_net.py"), "a file for the folder")


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (("lab", "run", "depth", "--quick", "--out", "out"), "out/depth.json"),
        (("demo", "--quick", "--out", "out"), "out/report.html"),
        (("bench", "--quick", "--json", "out"), "out"),
        (("bench", "--quick", "--json", "rows", "--csv", "rows"), "elsewhere"),
        (("bench", "--quick", "--report", "page.html"), "page.html/file"),
    ],
)
def test_a_result_that_could_not_be_written_is_refused_before_the_work(folder, monkeypatch, arguments, place):
    (folder / place).mkdir(parents=True)
    for work in ("bench._collect", "lab.run"):
        monkeypatch.setattr(f"batchnorm.cli.{work}", lambda *_: pytest.fail("it works first"))
    assert_refused(call(*arguments), place)


@pytest.mark.parametrize("option", ["--json", "--csv", "--report"])
def test_the_bench_writes_over_nothing(folder, monkeypatch, option):
    (folder / "rows").write_text("precious")
    monkeypatch.setattr("batchnorm.cli.bench._collect", lambda *_: pytest.fail("it works first"))
    result = call("bench", "--quick", option, "rows")
    assert_refused(result, option)
    assert f"{option} must not exist yet, but rows does" in result.stderr
    assert (folder / "rows").read_text() == "precious"


@pytest.mark.parametrize("reader", [load_rows, lambda path: result.load(path.stem, path.parent)])
def test_results_as_json(folder, reader):
    draw, path = random.Random(1), folder / "file.json"
    for content in [
        *garbage(draw),
        *mutations(OUTCOME, draw, 30),
        b'{"rows": 3}',
        b'{"rows": {"a": 1}}',
        b'{"arms": 1}',
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError):
            reader(path)


SUITE = b"""name = "small"
source = "made up"
batch = 2
layers = [{ shape = [3, 4, 4], count = 2, activation = "relu", residual = true }, { shape = [4] }]
"""


def test_suites_of_the_bench(folder, monkeypatch):
    draw, path = random.Random(2), folder / "suite.toml"
    monkeypatch.setattr(
        "batchnorm.cli.bench._collect", lambda measured, total: ([], False)
    )  # reads, but measures nothing
    wrong = [
        b"-1",
        b"0",
        b"1.5",
        b'"text"',
        b"[]",
        b"{}",
        b"true",
        b"9" * 25,
        b"9" * 5000,
        b"nan",
        b"1e400",
        b"2020-01-01",
    ]
    places = [b'"small"', b'"made up"', b"= 2\n", b"[3, 4, 4]", b"= 2,", b'"relu"', b"true", b"{ shape = [4] }", b"[4]"]
    changed = [
        SUITE.replace(
            place, (b"= " if place[:1] == b"=" else b"") + value + (place[-1:] if place[:1] == b"=" else b""), 1
        )
        for place in places
        for value in wrong
    ]
    nested = b"a = " + b"[" * 50_000 + b"]" * 50_000
    for number, content in enumerate([*garbage(draw), nested, *changed, *damaged(SUITE, draw, 60)]):
        path.write_bytes(content)
        result = call("bench", "--suite", path, "--quick", "--minutes", 0)
        if result.exit_code or number < 20:
            assert_refused(result, f"suite {number}, {content[:200]!r}")
    path.unlink()
    assert_refused(call("bench", "--suite", path), "no file")
    path.mkdir()
    assert_refused(call("bench", "--suite", path), "a folder")


@pytest.mark.parametrize("zipped", [False, True])
def test_images(folder, zipped):
    draw, data = random.Random(3), folder / "data"
    write_idx_files(data, zipped=zipped)
    paths = sorted(path for path in data.iterdir() if "images" in path.name or "labels" in path.name)
    for path in paths:
        whole = path.read_bytes()
        headers = [struct.pack(">IIII", 0x803, *sizes) for sizes in ((0, 28, 28), (2**31, 2**31, 2), (0, 0, 0))]
        headers += [struct.pack(">II", 0x801, size) for size in (0, 2**32 - 1)]
        for content in [*garbage(draw), *headers, whole[:5], whole[:-1]]:
            path.write_bytes(content)
            with pytest.raises(InputError):
                idx.load(data)
        path.write_bytes(b"")
        assert_refused(call("demo", "--data", data, "--out", "run"), path.name)
        path.write_bytes(whole)
    paths[0].unlink()
    paths[0].mkdir()
    assert_refused(call("demo", "--data", data, "--out", "run"), "a folder")


def test_recordings(folder):
    draw, table, file = random.Random(4), folder / "transcripts.csv", folder / "a.wav"
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(draw.randbytes(4000))
    whole = file.read_bytes()
    tables = [
        b"file,text\n\0,a\n",
        b"file,text\n.,a\n",
        b"file,text\na.wav\n",
        b"file,text\na.wav,a,b,c\n",
        b"a" * 200_000,
    ]
    tables += [b"file,text\n" + b"x" * 5000 + b",a\n", b'file,text\n"a' + b"\n" * 10, b"file,text\n../../../../dev,a\n"]
    for content in [*garbage(draw), *tables]:
        table.write_bytes(content)
        with pytest.raises(InputError):
            speech.load(folder)
    table.write_bytes(b"file,text,voice\na.wav,hello,v\n")
    for content in [*garbage(draw), *damaged(whole, draw, 60), b"RIFF\4\0\0\0WAVE", whole[:44]]:
        file.write_bytes(content)
        with pytest.raises(InputError):  # one voice is too few, however good the file
            speech.load(folder)


@pytest.mark.parametrize(
    "damage", [b"[" * 100_000, b'{"values": {"a": ' + b"9" * 400 + b"}}", b"\xff", b"null", b"3", b'{"values": 3}']
)
def test_a_stored_measurement_that_is_damaged_is_measured_again(folder, damage):
    class Job:
        file_name = "job.json"
        pack, unpack = staticmethod(packed), staticmethod(unpacked)

    (folder / "job.json").write_bytes(damage)
    assert stored(Job(), folder) is None


NAMES = ["[bold]", "[/red]", "[link=http://a]b[/link]", ":warning:"]
NAMES += ["\x1b[2J", "\x1b]0;title\x07", "a\rb", "a\nb", "\u202eabc", "\ud800", "\x9b31m"]


def hostile_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity())
    for name in NAMES:
        model._modules[name] = nn.BatchNorm1d(4)
    return model


class TestNames:
    """A name is shown as it is, whatever it looks like, and no terminal obeys it."""

    @pytest.fixture(autouse=True)
    def model(self, folder):
        with (folder / "hostile_net.py").open("a") as module:
            module.write("\nfrom tests.test_cli_hostile import hostile_model\n")

    @pytest.mark.parametrize("command", OUT)
    @pytest.mark.parametrize("charset", ["utf-8", "ascii"])
    def test_layers(self, command, charset):
        result = call(command, "hostile_net:hostile_model", *OUT[command], "--out", "out.pt", charset=charset)
        assert result.exit_code == 0, result.output
        shown = [name if name.isprintable() else visible(name) for name in NAMES]
        assert [name for name in shown if name not in result.stdout] == []
        assert all(c.isprintable() or c == "\n" for c in result.stdout)

    @pytest.mark.parametrize("command", OUT)
    @pytest.mark.parametrize("charset", ["utf-8", "latin-1", "ascii"])
    def test_json_has_the_names_themselves(self, command, charset):
        result = call(command, "hostile_net:hostile_model", *OUT[command], "--out", "out.pt", "--json", charset=charset)
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)
        rows = said.get("modules") or said.get("layers") or [{"layer": name} for name in said["left"]] + said["folded"]
        found = {row.get("module") or row.get("layer") or row.get("batch_norm") for row in rows}
        assert found == set(NAMES)

    def test_errors(self, folder):
        torch.save({"\x1b[2J[/red]\n": 3}, "in.pt")
        result = call("convert", "hostile_net:model", "--weights", "in.pt")
        assert_refused(result, "an escape sequence")
        assert "\\x1b[2J[/red]" in result.stderr

    def test_the_helpers(self):
        assert visible("é × [b]\x1b\n\t\x7f\u202e\u2028\ud800") == "é × [b]\\x1b\\n\\t\\x7f\\u202e\\u2028\\ud800"
        assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"
        assert (
            visible("96.3\u00a0±\u00a00.4%") == "96.3\u00a0±\u00a00.4%"
        )  # a space that does not break a line is no control character
        assert one_line(ValueError("a\n  b\x1b")) == "a b\\x1b"
        assert len(one_line(ValueError("a" * 10_000))) == 1000


@pytest.mark.parametrize(
    "arguments",
    [("explain", "0.8", "1.2"), ("env",), ("lab", "list"), ("env", "--json"), ("explain", "1", "2", "--json")],
    ids=" ".join,
)
@pytest.mark.parametrize("charset", ["ascii", "latin-1"])
def test_a_stdout_of_few_characters(arguments, charset):
    result = call(*arguments, charset=charset)
    assert result.exit_code == 0, result.output
    result.stdout_bytes.decode(charset)
    if "--json" in arguments:
        wide = json.loads(call(*arguments).stdout)
        assert json.loads(result.stdout_bytes.decode(charset)).keys() == wide.keys()


def test_ascii_by_the_environment():
    """As `LANG=C` does where nothing turns it into UTF-8: every character is ASCII, in plain spelling."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "batchnorm", "explain", "0.8", "1.2"]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"sigma" in done.stdout
    assert done.stdout.isascii()
