"""The commands as a person types them: numbers, JSON, one-line errors, Ctrl-C and going on."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from batchnorm import __main__, cli
from batchnorm.cli import SUMMARIES, commands
from batchnorm.explain import explain
from batchnorm.kernels import cpu
from batchnorm.lab import experiments, extras
from batchnorm.version import __version__
from tests.idx_files import header, write_idx_files

SOURCE = Path(__main__.__file__).parents[1]


def call(*arguments):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def start(*arguments):
    """A process of its own, with the interrupt handling that a terminal gives."""
    return subprocess.Popen(
        [sys.executable, "-m", "batchnorm", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


class TestExplain:
    def test_the_tutorials_example(self):
        result = call("explain", 0.8, 1.2, 0.9, 1.1, "--gamma", 0.5, "--beta", 2)
        assert result.exit_code == 0
        assert result.output == str(explain([0.8, 1.2, 0.9, 1.1], gamma=0.5, beta=2)) + "\n"

    def test_json(self):
        result = call("explain", 1, 2, 4, "--eps", 0.1, "--momentum", 0.5, "--grad", "0,1,-2.5", "--json")
        assert (
            json.loads(result.stdout) == explain([1, 2, 4], eps=0.1, momentum=0.5, grad_output=[0, 1, -2.5]).to_dict()
        )

    @pytest.mark.parametrize(
        "values", [("-1", "2"), ("-1.5", "-2e-3"), ("1", "-2", "--gamma", "-3"), ("--", "-1", "2")]
    )
    def test_negative_numbers_are_values(self, values):
        assert call("explain", *values).exit_code == 0

    def test_as_a_module(self):
        process = start("explain", "-1", "2")
        output, errors = process.communicate(timeout=300)
        assert (process.returncode, errors) == (0, "")
        assert output == str(explain([-1, 2])) + "\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("1",), "at least 2"),
            (("1", "nan"), "finite"),
            (("1", "2", "--eps", "0"), "eps must be above 0"),
            (("1", "2", "--grad", "1"), "one number per value"),
            (("1", "2", "--grad", "a,b"), "commas"),
            (("1", "two"), "'two' is neither a number nor a row"),
            (("1", "2", "--gama", "3"), "No such option '--gama'"),
            (("1", "2", "--gama=3"), "No such option '--gama'"),
            (("-1", "2", "-x"), "No such option '-x'"),
            (("1,2", "3"), "rows of 1 and of 2"),
            (("1", "2", "--shape", "3x2"), "3x2 has 6 and 2 were given"),
            (("1", "2", "--shape", "2x"), "separated by x"),
            (("1", "2", "--shape", "0x2"), "separated by x"),
            (("1,2", "3,4", "--channel", "2"), "0 to 1, but got 2"),
            (("1,2", "3,4", "--grad", "1,0"), "got 2 for 4 values"),
            (("1", "2", "--json", "--html", "page.html"), "leave out one of them"),
            (("gone.csv",), "'gone.csv' is neither"),
            ((), "Missing argument"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_2(self, arguments, message):
        result = call("explain", *arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        assert len(errors) == 1
        assert message in errors[0]
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ("1,10", "2,-20", "4,40"),
            ("1", "10", "2", "-20", "4", "40", "--shape", "3x2"),
            ("rows.csv",),
            ("rows.txt",),
            ("rows.npy",),
            ("-",),
        ],
        ids=" ".join,
    )
    def test_rows_files_and_standard_input(self, arguments, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("rows.csv").write_text('"a","b"\r\n1,10\r\n2,-20\r\n\r\n4, 40\r\n')
        Path("rows.txt").write_text("# two channels\n1 10\n2\t-20\n4  40 # last\n")
        np.save("rows.npy", np.array([[1, 10], [2, -20], [4, 40]], dtype=np.float32))
        shown = CliRunner().invoke(commands, ["explain", *arguments, "--json"], input="\ufeff1;10\n2;-20\n4;40\n")
        result = json.loads(shown.stdout)
        assert result["shape"] == [3, 2]
        first, second = result["channels"]
        names = ("0 (a)", "1 (b)") if arguments == ("rows.csv",) else ("0", "1")
        assert first == {"channel": names[0], **explain([1, 2, 4]).to_dict()}
        assert second == {"channel": names[1], **explain([10, -20, 40]).to_dict()}

    def test_images_are_normalized_over_every_axis_but_the_channels(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(2, 3, 2, 2))
        np.save(tmp_path / "x.npy", x)
        result = call("explain", tmp_path / "x.npy", "--grad", ",".join(map(str, range(24))))
        assert "Shape 2 x 3 x 2 x 2: 3 channels on axis 1" in result.stdout
        grad = np.arange(24.0).reshape(x.shape)
        for channel in range(3):
            it = explain(x[:, channel].ravel(), grad_output=grad[:, channel].ravel())
            assert f"Channel {channel}\n\n{it}" in result.stdout
        alone = call("explain", tmp_path / "x.npy", "--channel", 1).stdout
        assert "Channel 1\n" in alone
        assert "Channel 0\n" not in alone
        many = call("explain", *range(20), "--shape", "2x10").stdout
        assert "  9: 14, 25, 1.4, 5.9\n\n--channel 0 shows every step" in many

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has none"),
            ("1,,2\n", "line 1 has ''"),
            ("1,2\n3\n", "rows of 1 and of 2"),
            ("1 2\n3 x\n", "line 2 has 'x'"),
            ("1;2\n1,5;2\n", "line 2 has commas and semicolons"),
        ],
    )
    def test_a_bad_file_is_named(self, text, message, tmp_path):
        (tmp_path / "bad.csv").write_text(text)
        result = call("explain", tmp_path / "bad.csv")
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        (tmp_path / "bad.npy").write_text(text)
        result = call("explain", tmp_path / "bad.npy")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "bad.npy must be an array of real numbers" in result.stderr

    def test_the_terminals_width(self):
        parent, child = pty.openpty()
        termios.tcsetwinsize(child, (50, 64))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        command = [sys.executable, "-m", "batchnorm", "explain", *map(str, range(100))]
        with subprocess.Popen(
            command, env={**environment, "PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": "utf-8"}, stdout=child
        ):
            os.close(child)
            printed = b""
            with contextlib.suppress(OSError):  # the end of a terminal
                while part := os.read(parent, 65536):
                    printed += part
        os.close(parent)
        assert printed.decode().replace("\r\n", "\n") == explain(range(100)).text(64, 24) + "\n"

    def test_a_page(self, tmp_path):
        page = tmp_path / "page.html"
        assert call("explain", "1,10", "2,20", "4,40", "--html", page).exit_code == 0
        text = page.read_text()
        assert not re.findall(r"(?:href|src|url)\W+https?:", text)  # nothing is loaded
        assert "Channel 1: Backward (section 3)" in text
        assert text.count("<circle") == 2 * 3 * 3
        for number in explain([10, 20, 40]).grad_input:
            assert f"<td>{number:.6g}</td>" in text
        again = call("explain", 1, 2, "--html", page)
        assert again.exit_code == 2
        assert "--force" in again.stderr
        assert call("explain", 1, 2, "--html", page, "--force").exit_code == 0
        assert page.read_text() != text


class TestLoading:
    """What needs no torch answers without it: torch takes seconds to load."""

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--help",),
            ("--version",),
            ("explain", "--help"),
            ("explain", "0.8", "1.2"),
            ("explain", "1", "2", "--json"),
        ],
        ids=" ".join,
    )
    def test_no_torch(self, arguments):
        program = (
            "import sys; from batchnorm.__main__ import main\n"
            "try:\n"
            "    main()\n"
            "finally:\n"
            "    print(*(name for name in ('torch', 'numpy', 'rich') if name in sys.modules), file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "\n")
        assert done.stdout

    def test_the_list_of_commands_says_what_each_says_of_itself(self):
        context = click.Context(commands)
        assert list(SUMMARIES) == sorted(
            path.stem for path in Path(cli.__file__).parent.glob("*.py") if is_command(path)
        )
        for name in commands.list_commands(context):
            _, command, rest = commands.resolve_command(context, [name, "rest"])
            assert (command.name, rest) == (name, ["rest"])
            assert command.get_short_help_str(limit=1000) == SUMMARIES[name]

    def test_names_are_completed(self):
        items = commands.shell_complete(click.Context(commands), "e")
        assert [(item.value, item.help) for item in items] == [
            (name, commands.commands[name].get_short_help_str()) for name in ("env", "explain")
        ]

    def test_no_such_command(self):
        result = call("exlpain")
        assert result.exit_code == 2
        assert "No such command 'exlpain'" in result.stderr


def is_command(path):
    """A file of cli/ that defines the command of its name."""
    return f"def {path.stem}_command(" in path.read_text()


class TestHelp:
    @pytest.mark.parametrize("command", list(SUMMARIES))
    def test_each_command_has_an_example(self, command):
        result = call(command, "--help")
        assert result.exit_code == 0
        assert f"Example: batchnorm {command} " in result.output

    def test_version(self):
        assert call("--version").output == f"batchnorm, version {__version__}\n"
        assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


class TestMissingExtras:
    @pytest.mark.parametrize(
        ("blocked", "message"),
        [
            ("torch", "the command line needs torch: pip install torch"),
            ("click", "the command line needs click: pip install 'batchnorm[cli]'"),
            ("rich", "the command line needs rich: pip install 'batchnorm[cli]'"),
            ("torch click rich", "the command line needs torch, click, rich: pip install torch 'batchnorm[cli]'"),
        ],
    )
    @pytest.mark.parametrize("arguments", [(), ("--help",), ("env",)], ids=" ".join)
    @pytest.mark.parametrize("way", ["absent", "refused"])
    def test_a_missing_package_is_one_line_and_exit_2(self, blocked, message, arguments, way, tmp_path):
        """`sitecustomize` runs before anything of ours, as an environment without the package would be."""
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            f"BLOCKED = {blocked.split()}\n"
            "class Blocker:\n"
            "    def find_spec(name, path=None, target=None):\n"
            "        if name.partition('.')[0] in BLOCKED:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            + ("sys.meta_path.insert(0, Blocker)" if way == "refused" else "sys.modules.update(dict.fromkeys(BLOCKED))")
        )
        done = subprocess.run(
            [sys.executable, "-m", "batchnorm", *arguments],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE}"},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"Error: {message}\n")

    def test_the_commands_load_no_package_of_the_lab(self):
        listing = (
            "import sys, batchnorm.cli; print([name for name in ('matplotlib', 'sklearn') if name in sys.modules])"
        )
        environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
        done = subprocess.run(
            [sys.executable, "-c", listing], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == "[]\n"

    def test_without_matplotlib_one_line_before_any_work(self, monkeypatch, tmp_path):
        monkeypatch.setattr(extras, "find_spec", lambda module: None if module == "matplotlib" else object())
        result = call("demo", "--out", tmp_path / "run")
        assert result.exit_code == 2
        assert result.stderr == "Error: the lab needs matplotlib: pip install 'batchnorm[lab]'\n"
        assert not (tmp_path / "run").exists()


def units(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "units").glob("[!.]*.json")}


class TestDemo:
    def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(self, tmp_path):
        arguments = ("demo", "--quick", "--seeds", 2, "--workers", 1, "--out", tmp_path)
        process = start(*arguments)
        while len(units(tmp_path)) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert "learning rates that train" in output
        assert "holds" not in output  # no claim is judged before all is measured
        assert not (tmp_path / "report.html").exists()
        kept = units(tmp_path)
        assert 2 <= len(kept) < 4
        assert f"{len(kept)} of 4 measured" in output
        flat = " ".join(errors.split())
        assert f"{len(kept)} of 4 measurements are finished and stored. Continue with: batchnorm demo" in flat

        process = start(*arguments, "--json")
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0
        assert not errors or cpu.unavailable() is not None  # which is warned of
        after = units(tmp_path)
        assert len(after) == 4
        assert {name: after[name] for name in kept} == kept
        (told,) = json.loads(output)
        assert told["outcome"] == json.loads((tmp_path / "result.json").read_text())
        assert [claim["answer"] for claim in told["claims"][:2]] == ["holds", "holds"]
        assert (tmp_path / "report.html").read_text().count("<svg") == 3

    def test_idx_files_and_the_printed_table(self, tmp_path):
        write_idx_files(tmp_path / "data", zipped=True)
        arguments = ("--data", tmp_path / "data", "--out", tmp_path / "run", "--workers", 1)
        result = call("demo", "--quick", *arguments)
        assert result.exit_code == 0, result.output
        assert "Does batch normalization let the same network train faster" in result.output
        assert "quick, 1 seed" in result.output
        assert "without BN" in result.output
        assert len(re.findall(r"^(?:holds|does not hold) ", result.output, re.MULTILINE)) == 4
        assert "Wrote" in result.output
        saved = json.loads((tmp_path / "run" / "result.json").read_text())
        assert "--data" in saved["command"]
        assert saved["data"] == str(tmp_path / "data")
        assert (saved["experiment"], saved["size"]) == ("demo", "quick")

    @pytest.mark.parametrize("damage", ["missing", "corrupt"])
    def test_bad_idx_files_are_one_line_and_exit_2(self, tmp_path, damage):
        write_idx_files(tmp_path)
        path = tmp_path / "train-images-idx3-ubyte"
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:-1])
        result = call("demo", "--data", tmp_path, "--out", tmp_path / "run")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert "train-images-idx3-ubyte" in result.stderr

    @pytest.mark.parametrize("images", ["constant", "too few"])
    def test_images_without_use_are_one_line_and_exit_2(self, tmp_path, images):
        write_idx_files(tmp_path, train=64 if images == "too few" else 240)
        if images == "constant":
            content = header(3, 240, 28, 28) + bytes([100]) * 240 * 28 * 28
            (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
        result = call("demo", "--quick", "--data", tmp_path, "--out", tmp_path / "run")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert "training images" in result.stderr
        assert not (tmp_path / "run" / "result.json").exists()

    def test_ctrl_c_before_any_training_is_one_line(self, tmp_path, monkeypatch):
        def interrupted(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(experiments, "load", interrupted)
        result = call("demo", "--out", tmp_path / "run")
        assert result.exit_code == 130
        assert (result.stdout, result.stderr) == ("", "\nInterrupted.\n")

    def test_a_folder_that_cannot_be_written_is_one_line_and_exit_2(self, tmp_path):
        (tmp_path / "file").write_text("")
        result = call("demo", "--quick", "--out", tmp_path / "file")
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert "cannot write into" in result.stderr
