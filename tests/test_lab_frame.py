"""The lab's frame: units that are never measured twice, results that survive every end, the commands, and the page."""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from itertools import cycle, groupby
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from rich.progress import Task, TaskID

import batchnorm
from batchnorm.cli import commands
from batchnorm.cli.lab import TimeLeft, time_left
from batchnorm.errors import InputError
from batchnorm.files import spelled, to_json
from batchnorm.lab import experiments, fingerprint, result, runner
from batchnorm.lab import unit as units
from batchnorm.lab.experiment import KINDS, Experiment, Measured, Metric, Results, Setting, Verdict
from batchnorm.lab.fingerprint import code_version, data_version
from batchnorm.lab.result import Damaged, Outcome
from batchnorm.lab.unit import Finished, Unit, packed, unpacked
from batchnorm.report import findings
from batchnorm.report.curves import drawings
from batchnorm.report.lab import render
from batchnorm.report.rows import spread

ROOT = Path(__file__).parent.parent
PACKAGE = Path(batchnorm.__file__).parent
STRANGE = {"nan": math.nan, "never": math.inf, "below": -math.inf, "third": 1 / 3}


DAMAGES = (
    {"schema": 2},
    {"experiment": "depth"},
    {"size": "huge"},
    {"seconds": "x"},
    {"seconds": math.nan},
    {"environment": {}},
    {"environment": None},
    {"environment": {"date": 1}},
    {"command": None},
    {"by_arm": {}},
    {"by_arm": {"without": [], "with": []}},
    {"by_arm": {"without": [None], "with": [None]}},
    {"by_arm": {"without": [None, None], "with": [None]}},
    {"by_arm": {"without": [{}], "with": [None]}},
    {"unknown": 1},
)


def unit(experiment="depth", arm="plain", seed=0, size="quick", data=None, version=""):
    return Unit(experiment, arm, Setting(seed, size, data=data), version)


def tiny() -> Experiment:
    """The experiment of `tiny_lab`, without what that file does to the registry."""
    names, load = experiments.NAMES, experiments.load
    try:
        from tests import tiny_lab
    finally:
        experiments.NAMES, experiments.load = names, load
    return tiny_lab.EXPERIMENT


def known(arms=("without", "with"), seeds=2, missing=(), size="quick"):
    experiment = tiny()
    finished = [
        Finished(Unit("tiny", arm, Setting(seed, size)), tiny_measured(arm, seed), 1.5)
        for arm in arms
        for seed in range(seeds)
        if (arm, seed) not in missing
    ]
    return experiment, Outcome.of(experiment, seeds, finished, "batchnorm lab run tiny")


def tiny_measured(arm, seed):
    share = (0.9 if arm == "with" else 0.5) + seed / 100
    values = {"share": share, "steps": math.inf if arm == "without" else 10.0, "gap": math.nan}
    return Measured(values, {"course": [(1.0, 0.1), (2.0, share)]})


def two_claims(experiment):
    """A second claim, which does not hold."""
    return dataclasses.replace(
        experiment, claims={**experiment.claims, "It <never> fails.": lambda _: Verdict("does not hold", "It failed.")}
    )


def other_arms(experiment):
    return dataclasses.replace(experiment, arms={"other": "other arms"})


def other_metrics(experiment):
    return dataclasses.replace(experiment, metrics={"renamed": experiment.metrics["share"]})


class TestRegistry:
    @pytest.mark.parametrize("name", experiments.NAMES)
    def test_what_is_listed_is_there_and_whole(self, name):
        experiment = experiments.load(name)
        assert experiment.name == name
        assert len(experiment.arms) >= 2
        assert all(re.fullmatch(r"\w+", arm) for arm in experiment.arms)  # they are part of file names
        for text in (experiment.question, experiment.source, experiment.protocol, *experiment.claims):
            assert len(text) > 20, text
        assert experiment.question.endswith("?")
        assert experiment.metrics
        assert experiment.claims
        assert all(len(curve.caption) > 20 for curve in experiment.curves.values())

    def test_the_order_keeps_groups_together(self):
        kinds = [experiments.load(name).kind for name in experiments.NAMES]
        assert [kind for kind, _ in groupby(kinds)] == list(KINDS)

    def test_every_file_is_listed(self):
        files = {path.stem for path in (PACKAGE / "lab" / "experiments").glob("*.py")}
        listed = {experiments.module_of(name).rsplit(".", 1)[1] for name in experiments.NAMES}
        assert files - {"__init__"} == listed

    def test_a_file_that_is_missing_is_an_error(self, monkeypatch):
        monkeypatch.setattr(experiments, "NAMES", ("nowhere",))
        with pytest.raises(ModuleNotFoundError, match="nowhere"):
            experiments.load("nowhere")


class TestStored:
    def test_numbers_that_json_has_not_come_back(self):
        measured = Measured(STRANGE, {"a": [(0.0, math.nan), (1.0, math.inf)]})
        read = unpacked(json.loads(to_json(packed(measured))))
        assert repr(read) == repr(measured)  # NaN is not equal to itself
        assert [spelled(value) for value in STRANGE.values()] == ["nan", "inf", "-inf", 1 / 3]

    def test_other_arguments_data_or_code_are_another_unit(self, monkeypatch):
        different = [
            unit(),
            unit("lr-range"),
            unit(arm="batch_norm"),
            unit(seed=1),
            unit(size="full"),
            unit(version="other data"),
            dataclasses.replace(unit(), setting=Setting(0, "quick", "cuda")),
        ]
        assert len({each.file_name for each in different}) == len(different)
        assert unit(data="here", version="x").file_name == unit(data="there", version="x").file_name
        before = unit().file_name
        monkeypatch.setattr(units, "code_version", lambda module: "another")
        assert unit().file_name != before

    def test_a_damaged_file_is_measured_again(self, tmp_path):
        (path,) = _ran(tmp_path)
        whole = path.read_bytes()
        assert repr(runner.stored(unit(), tmp_path)) == repr(strange(unit()))
        other = to_json({"measured": {"values": {"nan": 1.0}, "curves": {}}, "seconds": 1}).encode()
        nothing = b'{"measured": {"values": {}, "curves": {}}, "seconds": 1}'
        shapes = (b"[]", b"null", b'{"measured": {}}', b'{"measured": [], "seconds": 1}', b"\xff\xfe")
        for damage in (*shapes, nothing, other):
            path.write_bytes(damage)
            assert runner.stored(unit(), tmp_path) is None, damage
        for cut in range(len(whole) - 2):  # without the line break it is whole
            path.write_bytes(whole[:cut])
            assert runner.stored(unit(), tmp_path) is None, cut
        assert _ran(tmp_path) == [path]
        assert path.read_bytes() == whole

    def test_a_full_disk_is_one_line(self, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(
            InputError, match=r"cannot write .*depth-plain.*: No space left on device; choose"
        ) as caught:
            list(runner.run(strange, [unit()], tmp_path, workers=1))
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def _ran(directory):
    list(runner.run(strange, [unit()], directory, workers=1))
    return sorted(directory.iterdir())


def strange(job):
    """A stand-in for a measurement, in a worker."""
    metrics = experiments.load(job.experiment).metrics
    return Finished(job, Measured(dict(zip(metrics, cycle(STRANGE.values()), strict=False))), 0.25)


class TestFingerprint:
    def test_code_is_what_an_experiment_imports_and_nothing_else(self):
        reached = {str(path.relative_to(PACKAGE)) for path in fingerprint._reached("batchnorm.lab.experiments.depth")}
        assert {
            "lab/experiments/depth.py",
            "lab/train.py",
            "lab/networks.py",
            "layers/layer.py",
            "kernels/cpu.py",
        } <= reached
        assert {
            "lab/experiments/lr_range.py",
            "lab/runner.py",
            "cli/lab.py",
            "report/lab.py",
            "__init__.py",
        }.isdisjoint(reached)
        built = {path.name for path in (PACKAGE / "kernels").glob("*.so")}
        assert built <= {Path(name).name for name in reached}

    def test_an_experiment_that_uses_another_one_depends_on_it(self):
        names = {path.name for path in fingerprint._reached("batchnorm.lab.experiments.lr_range")}
        assert {"lr_range.py", "demo.py"} <= names

    def test_it_follows_the_bytes_of_what_is_reached(self, monkeypatch, tmp_path):
        for name, source in {"a": "from batchnorm import b\n", "b": "", "c": ""}.items():
            (tmp_path / f"{name}.py").write_text(source)
        package = tmp_path.rename(tmp_path.with_name("batchnorm"))
        monkeypatch.setattr(fingerprint, "ROOT", package)

        def version():
            code_version.cache_clear()
            return code_version("batchnorm.a")

        before = version()
        (package / "c.py").write_text("other = 1")
        assert version() == before
        (package / "b.py").write_text("other = 1")
        changed = version()
        assert changed != before
        (package / "table.bin").write_bytes(b"data beside the code")
        assert version() not in (before, changed)
        code_version.cache_clear()

    def test_data_are_known_by_their_files(self, tmp_path):
        assert data_version(None) == ""
        (tmp_path / "x").write_text("1")
        before = data_version(str(tmp_path))
        assert data_version(str(tmp_path)) == before
        (tmp_path / "x").write_text("12")
        assert data_version(str(tmp_path)) != before
        with pytest.raises(InputError, match="there is no folder"):
            data_version(str(tmp_path / "nowhere"))


class TestOutcome:
    def test_saved_and_loaded_is_equal(self, tmp_path):
        _, came_out = known(missing={("with", 1)})
        came_out.save(result.path_of("tiny", tmp_path))
        assert repr(result.load("tiny", tmp_path)) == repr(came_out)
        assert result.load("depth", tmp_path) is None

    def test_only_a_complete_one_is_judged(self):
        experiment, complete = known()
        assert (complete.finished, complete.units, complete.seeds, complete.seconds) == (4, 4, 2, 6.0)
        assert complete.verdicts(experiment) == {"It works.": Verdict("holds", "90.5% with it.")}
        experiment, open_ = known(missing={("with", 1)})
        assert (open_.finished, open_.units, open_.verdicts(experiment)) == (3, 4, {})
        assert complete.fits(experiment)
        for other in (other_arms(experiment), other_metrics(experiment)):
            assert not complete.fits(other)
            assert complete.verdicts(other) == {}

    @pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 99}'])
    def test_what_is_none_is_refused(self, tmp_path, content):
        (tmp_path / "tiny.json").write_text(content)
        with pytest.raises(InputError, match=r"tiny\.json must be an outcome of schema 1"):
            result.load("tiny", tmp_path)

    @pytest.mark.parametrize("damage", DAMAGES, ids=str)
    def test_one_with_a_wrong_field_is_refused(self, tmp_path, damage):
        known()[1].save(tmp_path / "tiny.json")
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(InputError, match=r"tiny\.json must be an outcome of schema 1") as caught:
            result.load("tiny", tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            ([0.5], "0.50"),
            ([0.5, 1.0], "0.75 ± 0.35"),
            ([math.inf, 2.0], "never, 2.00"),
            ([math.inf, math.inf, 2.0], "never, never, 2.00"),
            ([math.nan, 2.0], "2.00"),
            ([math.nan], "–"),
            ([], "–"),
        ],
    )
    def test_seeds_as_text(self, values, text):
        assert spread(Metric("", ".2f"), values).replace("\u00a0", " ") == text

    def test_chosen_numbers_have_no_mean(self):
        assert spread(Metric("", ".3g", each=True), [0.3, 3.0, math.nan]) == "0.3, 3"


class TestPage:
    def test_it_holds_everything_and_no_address(self):
        experiment, complete = known()
        begun, half = (
            (dataclasses.replace(each, name="half") for each in (experiment,)),
            known(missing={("with", 1)})[1],
        )
        page = render(
            [(experiment, complete), (next(begun), half), (dataclasses.replace(experiment, name="later"), None)]
        )
        assert "✓ holds" in page
        assert "3 of 4 done" in page
        assert page.count("not measured") == 1
        assert "<td>Does &lt;it&gt; work?</td><td>later</td>" in page
        assert "Of 3 claims 1 is measured to the end: 1 × holds." in page
        for text in ("90.5% ±\u00a00.7%", "never", "3.14", "Nobody 2026", "2 seeds", "Does &lt;it&gt; work?"):
            assert text in page, text
        assert page.count("<svg") == 2
        assert "default-src 'none'" in page
        page = page.replace("http://www.w3.org/2000/svg", "")  # a name, which nothing loads
        assert not re.search(r"https?://|//[\w.]+/|@import|<script [^>]*src|<link(?! rel=\"icon\" href=\"data:)", page)
        assert set(re.findall(r'href="(#tiny[^"]*|#half[^"]*)"', page)) >= {"#tiny", "#half"}
        assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r'id="([^"]+)"', page))
        assert re.search(r"prefers-color-scheme: dark", page)

    def test_without_curves_the_headline_is_drawn(self):
        experiment, complete = known()
        page = render([(dataclasses.replace(experiment, curves={}), complete)])
        assert page.count("<svg") == 1
        assert 'aria-label="Share: without it 50.5%' in page

    def test_numbers_that_are_none_break_no_drawing(self):
        experiment, complete = known()
        strange = Measured(dict.fromkeys(experiment.metrics, math.nan), {"course": [(1.0, math.nan), (2.0, math.inf)]})
        by_arm = {arm: [strange] for arm in experiment.arms}
        for curves in (experiment.curves, {}):
            page = render(
                [(dataclasses.replace(experiment, curves=curves), dataclasses.replace(complete, by_arm=by_arm))]
            )
            assert page.count("<svg") == 1

    @pytest.mark.parametrize("change", [other_arms, other_metrics])
    def test_other_arms_or_metrics_than_now_are_said(self, change):
        experiment, complete = known()
        later = dataclasses.replace(experiment, name="later")
        page = render([(change(experiment), complete), (later, dataclasses.replace(complete, experiment="later"))])
        assert "measured with other arms or metrics than it has now: run it again" in page
        assert page.count("<svg") == 1  # the other experiment's

    def test_damaged_results_are_said_and_the_others_shown(self):
        experiment, complete = known()
        page = render([(experiment, complete), (dataclasses.replace(experiment, name="worse"), Damaged())])
        assert "run it again</td>" in page
        assert "Its results are damaged." in page
        assert "✓ holds" in page
        assert 'id="worse"' not in page

    def test_numbers_of_some_seeds_are_said_to_be_so(self):
        experiment, begun = known(missing={("with", 0), ("with", 1), ("without", 1)})
        page = render([(experiment, begun)])
        assert "quick, 1 of 4 measured; numbers are of the finished ones" in page
        assert "standard deviation" not in page
        assert "quick, 2 seeds; mean ± standard deviation" in render([known()])

    @pytest.mark.parametrize("length", [4, 20, 40])
    @pytest.mark.parametrize("arms", [2, 3, 5])
    def test_legends_are_as_wide_as_the_drawing_at_most(self, monkeypatch, arms, length):
        drawn = []
        legend = Figure.legend

        def noted(figure, *args, **kwargs):
            drawn.append((figure, legend(figure, *args, **kwargs)))
            return drawn[-1][1]

        monkeypatch.setattr(Figure, "legend", noted)
        labels = {f"arm{index}": f"{index}" * length for index in range(arms)}
        results = Results({arm: [tiny_measured("with", 0)] for arm in labels})
        drawings(dataclasses.replace(tiny(), arms=labels), results)
        (kept,) = [(figure, each) for figure, each in drawn if each in figure.legends]
        assert kept[1].get_window_extent().width <= kept[0].bbox.width
        assert (len({text.get_window_extent().x0 for text in kept[1].texts}) > 1) == (length < 40)


@pytest.fixture
def registry(monkeypatch):
    """Puts experiments like `tiny` in place of the lab's, by name, some of them changed."""

    def put(*names, **changes):
        experiment = tiny()
        monkeypatch.setattr(experiments, "NAMES", names)
        monkeypatch.setattr(
            experiments,
            "load",
            lambda name: changes.get(name, lambda same: same)(dataclasses.replace(experiment, name=name)),
        )

    return put


def call(*arguments):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


class TestCommands:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("run", "nope"), "there is no experiment nope; there are demo, lr-range, paper-4.1, depth"),
            (("run", "all", "nope"), "there is no experiment nope; there are demo, lr-range, paper-4.1, depth"),
            (("run", "depth", "--quick", "--full"), "a run has one size"),
            (("run", "cost", "gan", "--device", "meta"), "but cost, gan run on the CPU only"),
            (("run", "depth", "--device", "nowhere"), "--device must be one that torch can use here; nowhere is not"),
            (("run", "depth", "--data", "."), "--data is for experiments that accept data, but depth do not"),
            (("run", "lr-range", "--data", "nowhere"), "there is no folder nowhere"),
            (("run", "depth", "--out", "FILE"), "cannot write into FILE"),
            (("list", "--out", "FILE"), "--out must be a folder; FILE is a file"),
            (("report", "--out", "nowhere"), "a report needs results, but nowhere has none"),
            (("findings", "--out", "nowhere"), "findings need complete results, but nowhere has none"),
        ],
    )
    def test_bad_usage_is_one_line_and_exit_2(self, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "FILE").write_text("")
        result = call("lab", *arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert message in result.stderr

    def test_list_tells_question_time_and_result(self, tmp_path, monkeypatch):
        experiment, complete = known()
        monkeypatch.setattr(experiments, "NAMES", ("tiny", "later"))
        monkeypatch.setattr(experiments, "load", lambda name: dataclasses.replace(experiment, name=name))
        complete.save(tmp_path / "tiny.json")
        monkeypatch.setattr(experiments, "FIRST", ("later",))
        lines = call("lab", "list", "--out", tmp_path).stdout.splitlines()
        assert [line.split() for line in lines[2:5]] == [
            ["Claims", "about", "training"],
            ["tiny", "Does", "<it>", "work?", "6", "s", "holds", "(quick,", "2", "seeds)"],
            ["later", "*", "Does", "<it>", "work?", "~3", "s", "–"],
        ]
        assert lines[-2].endswith("~ is an estimate for the default size and 3 seeds, a guess.")
        assert lines[-1] == "* Start here: batchnorm lab run later --quick"
        listed = json.loads(call("lab", "list", "--out", tmp_path, "--json").stdout)
        assert [each["claims"][0]["answer"] for each in listed] == ["holds", None]
        assert [each["begin_here"] for each in listed] == [False, True]
        monkeypatch.undo()
        assert set(experiments.FIRST) <= set(experiments.NAMES)

    def test_list_groups_the_experiments_and_says_where_estimates_are_from(self, tmp_path, monkeypatch):
        changed = {
            "first": {"kind": "remedy", "timed_on": "a phone"},
            "second": {"kind": "application", "timed_on": "a watch"},
            "third": {"kind": "application", "timed_on": "a phone"},
        }
        monkeypatch.setattr(experiments, "NAMES", tuple(changed))
        monkeypatch.setattr(experiments, "load", lambda name: dataclasses.replace(tiny(), name=name, **changed[name]))
        lines = call("lab", "list", "--out", tmp_path).stdout.splitlines()
        words = [line.split(" ")[0] for line in lines[2:] if line.strip()]
        assert words == ["Applications", "second", "third", "Costs", "first", "Time"]
        assert lines[-1].endswith("measured on a phone (first, third); measured on a watch (second).")

    @pytest.mark.parametrize(
        ("size", "seeds", "state"),
        [("default", 3, "holds"), ("default", 1, "holds (default, 1 seed)"), ("quick", 3, "holds (quick, 3 seeds)")],
    )
    def test_list_tells_a_run_that_is_not_the_default(self, tmp_path, registry, size, seeds, state):
        registry("tiny")
        known(size=size, seeds=seeds)[1].save(tmp_path / "tiny.json")
        line = call("lab", "list", "--out", tmp_path).stdout.splitlines()[3]
        assert line.split("work?")[1].split()[2:] == state.split()

    @pytest.mark.parametrize("damage", [*DAMAGES, None], ids=str)
    def test_a_damaged_result_hides_no_other(self, tmp_path, registry, damage):
        registry("tiny", "fine")
        complete = known(size="default")[1]
        complete.save(tmp_path / "tiny.json")
        dataclasses.replace(complete, experiment="fine").save(tmp_path / "fine.json")
        path = tmp_path / "tiny.json"
        whole = path.read_text()
        path.write_text(whole[:-30] if damage is None else json.dumps(json.loads(whole) | damage))
        page = tmp_path / "findings.md"
        results = [
            call("lab", *each, "--out", tmp_path) for each in (["list"], ["report"], ["findings", "--page", page])
        ]
        for each in results:
            assert each.exit_code == 0, each.output
            (warning,) = each.stderr.splitlines()
            assert warning.startswith(f"Warning: {path} must be an outcome of schema 1: ")
        lines = results[0].stdout.splitlines()[3:]
        assert lines[0].split() == ["tiny", "Does", "<it>", "work?", "~3", "s", "damaged:", "run", "it", "again"]
        assert "holds" in lines[1]
        assert "✓ holds" in (tmp_path / "report.html").read_text()
        assert "Not included, because they are incomplete: tiny." in results[2].stdout

    @pytest.mark.parametrize("change", [other_arms, other_metrics])
    def test_a_result_of_other_arms_or_metrics_hides_no_other(self, tmp_path, registry, change):
        registry("tiny", "fine", tiny=change)
        complete = known(size="default")[1]
        complete.save(tmp_path / "tiny.json")
        dataclasses.replace(complete, experiment="fine").save(tmp_path / "fine.json")
        result = call("lab", "list", "--out", tmp_path)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "has other arms or metrics: run" in result.stdout
        assert "holds" in result.stdout
        assert call("lab", "report", "--out", tmp_path).exit_code == 0
        assert "Not included" in call("lab", "findings", "--out", tmp_path, "--page", tmp_path / "x.md").stdout

    def test_every_claim_is_told(self, tmp_path, registry):
        registry("tiny", tiny=two_claims)
        known(size="default", seeds=3)[1].save(tmp_path / "tiny.json")
        line = call("lab", "list", "--out", tmp_path).stdout.splitlines()[3]
        assert line.split("work?")[1].split() == ["9", "s", "1", "of", "2", "hold"]
        (listed,) = json.loads(call("lab", "list", "--out", tmp_path, "--json").stdout)
        assert [(each["claim"], each["answer"]) for each in listed["claims"]] == [
            ("It works.", "holds"), ("It <never> fails.", "does not hold")
        ]  # fmt: skip
        assert call("lab", "report", "--out", tmp_path).exit_code == 0
        page = (tmp_path / "report.html").read_text()
        assert "All 2 claims are measured: 1 × holds, 1 × does not hold." in page
        assert page.count("It &lt;never&gt; fails.") == 2  # among all claims, and with its experiment
        assert page.count("It failed.") == 1
        assert call("lab", "findings", "--out", tmp_path, "--page", tmp_path / "page.md").exit_code == 0
        text = (tmp_path / "page.md").read_text()
        assert "| [tiny](#tiny) | It works. | holds |\n| [tiny](#tiny) | It <never> fails. | does not hold |" in text
        assert "Claim: It <never> fails. Verdict: **does not hold**.\n\nIt failed.\n" in text

    def test_report_writes_the_page(self, tmp_path, monkeypatch):
        experiment, complete = known()
        monkeypatch.setattr(experiments, "NAMES", ("tiny",))
        monkeypatch.setattr(experiments, "load", lambda name: experiment)
        complete.save(tmp_path / "tiny.json")
        assert call("lab", "report", "--out", tmp_path).stdout == f"Wrote {tmp_path / 'report.html'}.\n"
        assert "✓ holds" in (tmp_path / "report.html").read_text()

    def test_findings_are_a_page_and_drawings_of_what_is_complete(self, tmp_path, monkeypatch):
        experiment, complete = known(size="default")
        monkeypatch.setattr(experiments, "NAMES", ("tiny", "half", "later"))
        monkeypatch.setattr(experiments, "load", lambda name: dataclasses.replace(experiment, name=name))
        complete.save(tmp_path / "tiny.json")
        dataclasses.replace(known(missing={("with", 1)})[1], experiment="half").save(tmp_path / "half.json")
        page = tmp_path / "docs" / "findings.md"
        assert call("lab", "findings", "--out", tmp_path, "--page", page).stdout == (
            f"Wrote {page} and 1 plots.\nNot included, because they are incomplete: half, later.\n"
        )
        text = page.read_text()
        assert "| [tiny](#tiny) | It works. | holds |" in text
        assert "| share | 50.5% ±\u00a00.7% | 90.5% ±\u00a00.7% |" in text
        assert "| steps | never, never | 10" in text
        assert "half" not in text
        assert "](findings/tiny.svg)" in text
        (drawing,) = (page.parent / "findings").iterdir()
        assert drawing.name == "tiny.svg"
        assert ElementTree.parse(drawing).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "--series-3" in drawing.read_text()

    def test_findings_are_never_of_quick_runs(self, tmp_path, registry):
        registry("tiny")
        known()[1].save(tmp_path / "tiny.json")
        result = call("lab", "findings", "--out", tmp_path, "--page", tmp_path / "x.md")
        assert (result.exit_code, result.stdout) == (2, "")
        assert (
            result.stderr
            == "Error: findings need runs of size default or full, but tiny ran with --quick; run them again without it\n"
        )
        assert not (tmp_path / "x.md").exists()


def start(*arguments):
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}{ROOT}", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "tiny_lab.py"), "lab", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs are deaf to it
    )  # fmt: skip


def stored(directory):
    return {path.name: path.stat().st_mtime_ns for path in (directory / "units").glob("[!.]*.json")}


def wait_for(count, directory, process):
    while len(stored(directory)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class TestTimeLeft:
    costs: ClassVar = {"depth": 10.0, "demo": 30.0}
    units = (unit(), unit(seed=1), unit("demo"))

    def test_at_first_it_is_the_estimate(self):
        assert time_left(self.costs, self.units, [], workers=1) == 50
        assert time_left(self.costs, self.units, [], workers=4) == 30  # no worker shares a unit with another

    def test_what_is_done_tells_the_pace(self):
        done = [Finished(self.units[0], strange(self.units[0]).measured, 20.0)]  # twice the estimate
        assert time_left(self.costs, self.units, done, workers=1) == 80

    def test_at_the_end_nothing_is_left(self):
        done = [Finished(each, strange(each).measured, 1.0) for each in self.units]
        assert time_left(self.costs, self.units, done, workers=2) == 0

    @pytest.mark.parametrize(("ends", "text"), [(1065.0, "about 1:05 left"), (10.0, "about 0:00 left")])
    def test_it_counts_down(self, monkeypatch, ends, text):
        monkeypatch.setattr("time.monotonic", lambda: 1000.0)
        task = Task(TaskID(0), "", total=1, completed=0, _get_time=lambda: 0.0, fields={"ends": ends})
        assert TimeLeft().render(task).plain == text


class TestEnds:
    def test_killed_it_goes_on_where_it_was(self, tmp_path):
        arguments = ("run", "tiny", "--workers", 2, "--out", tmp_path, "--seeds", 12)
        process = start(*arguments)
        wait_for(2, tmp_path, process)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = workers.read_text().split() if workers.exists() else []
        process.kill()
        process.communicate()
        kept = stored(tmp_path)
        assert 2 <= len(kept) < 24
        for _ in range(500):  # the workers see that they are alone
            if all(map(gone, children)):
                break
            time.sleep(0.02)
        assert all(map(gone, children))
        assert stored(tmp_path) == kept
        begun = result.load("tiny", tmp_path)
        assert begun is not None
        assert begun.finished >= 1  # the report knows of them

        output, errors = start(*arguments, "--json").communicate(timeout=120)
        assert errors == ""
        after = stored(tmp_path)
        assert len(after) == 24
        assert {name: after[name] for name in kept} == kept
        (said,) = json.loads(output)
        assert said["claims"] == [{"claim": "It works.", "answer": "holds", "evidence": "95.5% with it."}]
        assert said["outcome"]["by_arm"]["without"][0]["values"] == {"share": 0.5, "steps": "inf", "gap": "nan"}

    def test_ctrl_c_says_how_to_go_on(self, tmp_path):
        process = start("run", "tiny", "--workers", 1, "--out", tmp_path, "--seeds", 40)
        wait_for(2, tmp_path, process)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in errors
        kept = len(stored(tmp_path))
        assert f"{kept} of 80 measurements are finished and stored. Continue with:" in errors
        assert f"batchnorm lab run tiny --out {tmp_path} --seeds 40 --workers 1" in errors
        assert f"{kept} of 80 measured" in output

    def test_what_an_experiment_says_against_its_data_is_one_line(self, tmp_path):
        process = start("run", "tiny", "--out", tmp_path / "out", "--data", tmp_path, "--workers", 1)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert (output, errors) == ("", "Error: data must be real; these are not: bring others\n")


def test_the_page_of_findings_is_what_the_published_results_say():
    """Make it again with: batchnorm lab findings --out benchmarks/results/lab --page docs/findings.md"""
    root = Path(__file__).parent.parent
    results = root / "benchmarks" / "results" / "lab"
    known = [
        (experiment, result.load(experiment.name, results)) for experiment in map(experiments.load, experiments.NAMES)
    ]
    text, pictures = findings.render([(experiment, found) for experiment, found in known if found], "findings")
    assert len(pictures) == len(known) == 21
    assert (root / "docs" / "findings.md").read_text(encoding="utf-8") == text
