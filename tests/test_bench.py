"""The benchmark: its arithmetic is right on made-up times, its rows are complete. No times are judged."""

import csv
import io
import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm import measure
from batchnorm.bench import allocator, memory, networks, providers, run, suite, targets
from batchnorm.bench.accuracy import Exact
from batchnorm.bench.case import DIRECTIONS, cases, quick, tensors
from batchnorm.bench.row import Row, load, to_dict
from batchnorm.bench.suite import Layer
from batchnorm.bench.tables import model_table, summary_tables
from batchnorm.cli import commands
from batchnorm.errors import InputError
from batchnorm.files import to_json
from batchnorm.report.bench import render
from tests.layer_table import ACTIVATIONS
from tests.test_bench_cases import case
from tests.test_report import Page


def call(*arguments):
    return CliRunner().invoke(commands, ["bench", *map(str, arguments)])


class FakeClock:
    """Every reading is one second later than the last."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


class TestArithmetic:
    @pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 2.0, 3.0], list(range(100))])
    @pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
    def test_percentiles_are_numpys(self, values, percent):
        assert measure.percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-12)

    def test_geometric_mean(self):
        assert measure.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
        assert measure.geometric_mean([1.0, 16.0], [3, 1]) == pytest.approx(2.0)

    def test_rounds_take_turns_in_changing_order(self):
        order = []
        functions = {name: (lambda name=name: order.append(name)) for name in "abc"}
        samples = measure.interleaved(functions, measure.Effort(0.0, least=6), FakeClock())
        assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 6)
        rounds = [tuple(order[-3 * k : len(order) - 3 * k + 3]) for k in range(6, 0, -1)]
        assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
        assert len(set(rounds)) > 1

    def test_rounds_end_with_the_time_and_with_the_most(self):
        functions = {"a": lambda: None}
        assert (
            len(measure.interleaved(functions, measure.Effort(1e9, least=1, most=4), FakeClock(), FakeClock())["a"])
            == 4
        )
        assert len(measure.interleaved(functions, measure.Effort(0.0, least=2), FakeClock())["a"]) == 2

    def test_short_calls_are_repeated_within_a_sample(self):
        calls = []
        ticks = iter(i * 1e-5 for i in range(10**6))
        measure.interleaved({"a": lambda: calls.append(1)}, measure.Effort(0.0, least=1), lambda: next(ticks))
        assert (
            len(calls) == 4 + 2 * 401
        )  # the first looks, a sample to warm up, one that counts: 4e-3 s / 1e-5 s, rounded up

    def test_ratios_from_made_up_seconds(self):
        one = case((64, 64, 64, 64), direction="backward")
        samples = {"copy": [0.1, 0.2, 0.3], "eager": [0.9, 0.9, 0.9], "ours": [0.3, 0.3, 0.6]}
        made = {row.provider: row for row in run.rows(one, samples, dict.fromkeys(samples), dict.fromkeys(samples))}
        assert made["ours"].limit == pytest.approx(0.2e3)
        assert made["ours"].ratio_to_limit == pytest.approx(1.5)
        assert made["ours"].ratio_to_eager == pytest.approx(3.0)
        assert made["copy"].ratio_to_limit == 1.0
        assert (made["ours"].p20, made["ours"].p50, made["ours"].p80) == pytest.approx((300, 300, 480))
        assert made["ours"].unit == "ms"


def made_up_rows(ours=0.1, eager=1.0, shapes=((64, 64, 64, 64), (32, 64, 64, 64))):
    found = []
    for index, shape in enumerate(shapes):
        one = case(layer=Layer(shape, count=index + 1, activation="relu"))
        samples = {"copy": [0.1], "eager": [eager], "onednn": [0.5], "ours": [ours]}
        found += run.rows(one, samples, dict.fromkeys(samples, 1e-7), dict.fromkeys(samples, 10**6))
    return found


class TestTargets:
    def test_means_are_weighed_by_layers(self):
        rows = made_up_rows()
        rows[-1] = replace(rows[-1], ratio_to_limit=8.0)
        (summary,) = targets.summarize(rows)
        assert summary.ratio_to_limit["ours"] == pytest.approx(4.0)  # (1 · 8²)^(1/3)
        assert summary.faster == {"eager": pytest.approx(10.0), "onednn": pytest.approx(5.0)}
        assert summary.verdict == "missed"

    @pytest.mark.parametrize(("ours", "holds"), [(0.1, "held"), (0.13, "held"), (0.14, "missed"), (0.3, "missed")])
    def test_a_target_holds_if_all_its_parts_do(self, ours, holds):
        assert targets.summarize(made_up_rows(ours))[0].verdict == holds
        assert targets.summarize(made_up_rows(ours, eager=0.4))[0].verdict == "missed"

    def test_there_is_no_verdict_where_the_spread_exceeds_the_effect(self):
        """The ratio to the limit is 1.25 to 1.35 and the target 1.3; ours against eager is 8 to 12 and the target 5."""
        near = [replace(row, p20=row.p50 * 0.96, p80=row.p50 * 1.04) for row in made_up_rows(0.13)]
        assert targets.summarize(near)[0].verdict == "too noisy"
        far = [replace(row, p20=row.p50 * 0.9, p80=row.p50 * 1.1) for row in made_up_rows(0.1)]
        assert targets.summarize(far)[0].verdict == "held"
        busy = [replace(row, p20=row.p50 / 50) if row.provider == "eager" else row for row in made_up_rows(0.1)]
        assert targets.summarize(busy)[0].verdict == "too noisy"
        slow = [replace(row, p20=row.p50 * 0.9, p80=row.p50 * 1.1) for row in made_up_rows(0.3)]
        assert targets.summarize(slow)[0].verdict == "missed"

    def test_small_tensors_are_left_out(self):
        assert targets.summarize(made_up_rows(shapes=((2, 3, 4, 4),))) == []

    def test_of_layers_the_worst_counts(self):
        rows = [replace(row, case="layer forward", direction="forward") for row in made_up_rows(1.04, 1.0)]
        assert targets.summarize(rows)[0].verdict == "held"
        slower = {name: getattr(rows[-1], name) * 1.02 for name in ("p20", "p50", "p80")}
        rows[-1] = replace(rows[-1], **slower)
        assert targets.summarize(rows)[0].verdict == "missed"

    def test_compiled_layers_are_compared_with_compiled_ones(self):
        seconds = {"copy": 0.1, "eager": 1.0, "ours": 0.5, "compile": 0.9, "compile ours": 1.0}
        samples = {name: [value] for name, value in seconds.items()}
        one = case(layer=Layer((64, 64, 64, 64)), direction="step", through="layer")
        rows = run.rows(one, samples, dict.fromkeys(samples, 1e-7), dict.fromkeys(samples, 10**6))
        (summary,) = targets.summarize(rows)
        assert summary.faster == {"eager": pytest.approx(2.0), "compile": pytest.approx(0.9)}
        assert summary.worst == pytest.approx(0.9)
        assert summary.verdict == "missed"


class TestNeverSlower:
    """The suite of all layers, against torch's eager and compiled."""

    def test_it_has_each_layer_of_the_others_once(self):
        found = suite.load("never-slower")
        assert len(set(found.layers)) == len(found.layers) > 60
        assert set(suite.load("resnet50").layers) <= set(found.layers)
        assert (found.through, found.directions) == ("layer", ("forward", "step", "inference"))

    def test_its_defaults_are_those_of_the_command(self):
        found = quick(suite.load("never-slower"))
        chosen = cases([found], ["planar"], None, None, ["fresh"], [1])
        assert {(one.dtype, one.direction) for one in chosen} == {
            (dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("forward", "step", "inference")
        }
        assert {one.dtype for one in cases([suite.load("tiny")], ["planar"], None, None, ["fresh"], [1])} == {"float32"}

    @pytest.mark.slow
    def test_compiled_layers_compute_the_same(self):
        one = case((4, 3, 8, 8), direction="step", through="layer")
        given = tensors(one)
        for provider in providers.find(["compile", "compile ours"]):
            if provider.name != "copy":
                with torch.set_grad_enabled(True):
                    assert Exact(one, given).error(provider.prepare(one, given)()[0]) < 2e-6


class TestProviders:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("layout", ["planar", "channels_last"])
    def test_all_compute_the_same(self, direction, residual, layout):
        one = case((4, 6, 5, 5), direction=direction, layout=layout)
        one = replace(one, layer=replace(one.layer, residual=residual))
        given = tensors(one)
        for name in ("eager", "onednn", "ours"):
            (provider,) = (found for found in providers.PROVIDERS if found.name == name)
            if provider.refuses(one) is None:
                with torch.set_grad_enabled(one.needs_grad):
                    assert Exact(one, given).error(provider.prepare(one, given)()[0]) < 2e-6

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("shape", [(8, 5), (4, 3, 7), (2, 3, 4, 4), (2, 3, 2, 3, 4)])
    def test_layers_compute_the_same(self, direction, shape):
        one = case(shape, direction=direction, through="layer")
        given = tensors(one)
        for provider in providers.PROVIDERS:
            if provider.name != "copy" and provider.refuses(one) is None:
                with torch.set_grad_enabled(one.needs_grad):
                    assert Exact(one, given).error(provider.prepare(one, given)()[0]) < 2e-6

    @pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
    def test_activations(self, activation):
        one = case(layer=Layer((4, 6, 5, 5), activation=activation), direction="step")
        given = tensors(one)
        for provider in providers.find(["ours"])[1:]:
            assert Exact(one, given).error(provider.prepare(one, given)()[0]) < 2e-6

    def test_an_error_is_seen(self):
        one = case(direction="forward")
        given = tensors(one)
        y = providers.Eager().prepare(one, given)()[0]
        y[0, 0, 0, 0] += 0.5
        assert Exact(one, given).error(y) == pytest.approx(0.5, abs=1e-5)
        y[0, 0, 0, 0] = math.nan
        assert Exact(one, given).error(y) == math.inf

    def test_what_cannot_be_done_is_refused_with_a_reason(self):
        assert "float32" in providers.OneDNN().refuses(case(dtype="bfloat16"))
        assert "silu" in providers.OneDNN().refuses(case(layer=Layer((2, 3, 4, 4), activation="silu")))
        assert "replicas" in providers.Compile("compile", ours=False).refuses(case(through="replicas"))


class TestMemory:
    def test_peak_counts_what_is_held_at_once(self):
        def work():
            first = torch.empty(1 << 20)
            del first
            return torch.empty(1 << 18) + 1

        assert 4 << 20 <= measure.peak_bytes(work) < 5 << 20

    def test_saved_is_what_the_graph_keeps(self):
        x = torch.randn(100, 100, requires_grad=True)
        assert measure.saved_bytes(lambda: x.neg().exp().sum()) == 4 * 100 * 100
        assert measure.saved_bytes(lambda: x.square().square().sum()) == 4 * 100 * 100
        with torch.no_grad():
            assert measure.saved_bytes(lambda: x.square().square().sum()) == 0

    def test_reused_outputs_need_glibc(self, monkeypatch):
        monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("musl", ""))
        with pytest.raises(InputError, match="glibc"), memory.outputs("reused"):
            pass


SMALL = """
name = "small"
source = "made up"
batch = 2
layers = [
  { shape = [4, 6, 6], count = 2, activation = "relu" },
  { shape = [4, 6, 6], activation = "relu", residual = true },
  { shape = [8] },
]
"""


class TestCommand:
    @pytest.fixture
    def small(self, tmp_path):
        (tmp_path / "small.toml").write_text(SMALL)
        return tmp_path / "small.toml"

    def test_rows_are_complete_in_every_form(self, small, tmp_path):
        out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "html")}
        arguments = ("--suite", small, "--minutes", 0, "--threads", "1", "--outputs", "fresh")
        result = call(*arguments, "--json", out["json"], "--csv", out["csv"], "--report", out["html"])
        assert result.exit_code == 0, result.output
        rows = load(out["json"])
        assert len(rows) == 3 * (2 * 4 + 2 * 3 + 3)  # directions · (planar with oneDNN, channels_last, two dimensions)
        assert all(row.ratio_to_limit > 0 and row.ratio_to_eager > 0 for row in rows)
        assert all(row.p20 <= row.p50 <= row.p80 and row.rounds >= 5 for row in rows)
        assert all(row.max_error < 1e-5 for row in rows if row.provider != "copy")
        assert all(row.cpu and row.date and row.torch == torch.__version__ for row in rows)
        assert json.loads(out["json"].read_text())["command"].startswith("batchnorm bench --suite")
        assert "function backward" in result.stdout

        table = list(csv.DictReader(io.StringIO(out["csv"].read_text())))
        assert [line["provider"] for line in table] == [row.provider for row in rows]
        assert list(table[0]) == [field.name for field in fields(Row)]

        page = Page(out["html"].read_text())
        assert sum(tag == "svg" for tag, _ in page.tags) == 6
        assert len(page.ids) == len(set(page.ids))
        assert all(value.startswith(("data:", "#")) for tag, value in page.links)

    def test_quick_tiny(self):
        result = call("--suite", "tiny", "--quick", "--minutes", 0, "--threads", "1", "--layout", "planar")
        assert result.exit_code == 0, result.output
        assert "tiny · layer step" in result.stdout
        assert "all shapes" in result.stdout
        assert "≥0.95" in result.stdout

    def test_replicas_are_compared_with_layers_alone(self, tmp_path):
        (tmp_path / "two.toml").write_text(
            'name = "two"\nsource = "made up"\nbatch = 3\nthrough = "replicas"\nlayers = [{ shape = [5, 4], activation = "relu" }]\n'
        )
        result = call(
            "--suite",
            tmp_path / "two.toml",
            "--minutes",
            0,
            "--threads",
            "1",
            "--layout",
            "planar",
            "--ranks",
            "3",
            "--csv",
            tmp_path / "rows.csv",
        )
        assert result.exit_code == 0, result.output
        assert "two · replicas step" in result.stdout
        rows = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
        assert [row["provider"] for row in rows] == 2 * ["copy", "eager", "ours", "synchronized"]
        assert {row["ranks"] for row in rows} == {"3"}
        assert "3 processes" in result.stdout
        assert all(int(row["rounds"]) >= 5 and float(row["p50"]) > 0 for row in rows)

    def test_one_process_has_nothing_to_wait_for(self):
        assert call("--suite", "sync", "--ranks", "1").exit_code == 2

    def test_what_does_not_fit_into_memory_is_left_out(self, small, monkeypatch):
        monkeypatch.setattr(memory, "TENSORS", 2**40)
        with pytest.warns(UserWarning, match="left out: it needs .* GB are free"):
            result = call("--suite", small, "--layout", "planar", "--threads", "1", "--minutes", 0)
        assert result.exit_code == 0, result.output

    def test_growth_is_drawn_where_sizes_span_decades(self):
        rows = made_up_rows(shapes=((64, 64, 64, 64), (1, 64, 4, 4), (16, 64, 64, 64)))
        page = render(rows, "-")
        assert "How cost grows" in page
        assert "ns per value" in page
        assert "How cost grows" not in render(made_up_rows(), "-")

    @pytest.mark.parametrize("slower", [True, False])
    @pytest.mark.parametrize("through", suite.THROUGH[:2])
    def test_a_layer_that_seems_slower_is_measured_again(self, through, slower, monkeypatch):
        calls, instances = list[int](), set[object]()

        def samples(timed, effort, *_):
            calls.append(effort.least)
            instances.update(timed.values())
            return {name: [2.0 if slower and name == "ours" else 1.0] * effort.least for name in timed}

        monkeypatch.setattr(run.device, "samples", samples)
        one = case(layer=Layer((4, 3)), through=through)
        rows = next(run.run([one], providers.find(["copy", "eager", "ours"]), 0.0, 5))
        again = slower and through == "layer"
        assert calls == [5] * (5 if again else 1)
        assert len(instances) == 3 * len(calls)
        assert [row.rounds for row in rows] == [25 if again else 5] * 3

    def test_layers_of_torch_are_compared_with_themselves(self, monkeypatch):
        def samples(timed, effort, *_):
            return {name: [1.25 if name == "eager again" else 1.0] * effort.least for name in timed}

        monkeypatch.setattr(run.device, "samples", samples)
        chosen = providers.find(["ours", "eager again"])
        arguments = [case(layer=Layer((4, 3)), through="layer")], chosen, 0.0, 5
        (summary,) = targets.summarize(next(run.run(*arguments)))
        assert (summary.worst, summary.below, summary.itself) == (1.0, 0, (0.8, 1))
        assert "eager again" not in summary.faster

    @pytest.mark.parametrize(("itself", "verdict"), [(0.8, "too noisy"), (0.92, "missed")])
    def test_no_verdict_within_what_torchs_layers_differ_from_themselves(self, itself, verdict):
        times = {"copy": 1.0, "eager": 0.9, "eager again": 0.9 / itself, "ours": 1.0}
        one = case(layer=Layer((4, 3)), through="layer")
        found = run.rows(
            one, {name: [time] * 5 for name, time in times.items()}, dict.fromkeys(times), dict.fromkeys(times)
        )
        (summary,) = targets.summarize(found)
        assert (summary.verdict, summary.below) == (verdict, 1)

    def test_layers_may_be_compared_compiled_alone(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        arguments = ("--layout", "channels_last", "--threads", "1", "--minutes", 0, "--direction", "inference")
        result = call("--suite", "tiny", "--quick", *arguments, "--provider", "compile,compile ours,compile again")
        assert result.exit_code == 0, result.output
        assert "geometric means" in result.stdout

    def test_compile_is_compared_if_asked(self, small, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        arguments = ("--layout", "planar", "--threads", "1", "--minutes", 0, "--outputs", "reused")
        result = call("--suite", small, *arguments, "--provider", "compile,ours", "--direction", "step,inference")
        assert result.exit_code == 0, result.output
        assert "compile" in result.stdout

    def test_ctrl_c_shows_what_was_measured(self, small, tmp_path, monkeypatch):
        measure, left = run._measure, [2]

        def interrupted(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return measure(*arguments)

        monkeypatch.setattr(run, "_measure", interrupted)
        result = call("--suite", small, "--minutes", 0, "--outputs", "fresh", "--json", tmp_path / "out.json")
        assert result.exit_code == 130
        assert "Interrupted" in result.stderr
        assert len({(row.direction, row.threads) for row in load(tmp_path / "out.json")}) == 2

    def test_threads_are_as_before(self, small):
        call("--suite", small, "--minutes", 0, "--threads", "2", "--outputs", "fresh", "--layout", "planar")
        assert torch.get_num_threads() == 1

    def test_infinite_errors_are_written_and_read(self, tmp_path):
        row = Row(**{field.name: math.inf if "float" in str(field.type) else "text" for field in fields(Row)})
        (tmp_path / "rows.json").write_text(to_json(to_dict([row], "command")))
        assert load(tmp_path / "rows.json") == [row]

    def test_a_file_that_is_no_rows(self, tmp_path):
        (tmp_path / "rows.json").write_text('{"rows": [{"suite": "a"}]}')
        with pytest.raises(InputError, match="measure again"):
            load(tmp_path / "rows.json")


class TestModel:
    def test_steps_of_a_small_network(self, monkeypatch, tmp_path):
        small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network = networks.Network(lambda: nn.Sequential(*small, nn.Linear(4, 1000)), (3, 16, 16), (4, 2))
        monkeypatch.setitem(networks.NETWORKS, "resnet50", network)
        out = tmp_path / "out.json"
        arguments = ("--model", "resnet50", "--quick", "--threads", "1", "--json", out, "--report", tmp_path / "a.html")
        result = call(*arguments, "--fuse", "--memory", "--frozen")
        assert result.exit_code == 0, result.output
        rows = load(out)
        assert [(row.layout, row.provider) for row in rows] == [
            (layout, provider)
            for layout in ("planar", "channels_last")
            for provider in ("eager", "ours", "fused", "save memory", "eval", "frozen", "frozen statistics")
        ]
        assert all(row.ratio_to_eager > 0 and row.peak_bytes > row.saved_bytes > 0 for row in rows)
        assert "Training steps" in (tmp_path / "a.html").read_text()

    def test_compiled_steps_are_compared_with_compiled_ones(self):
        (row,) = made_up_rows()[:1]
        times = {
            "eager": 8.0,
            "ours": 4.0,
            "eager again": 8.0,
            "compile": 3.0,
            "compile ours": 2.0,
            "compile again": 6.0,
        }
        steps = [replace(row, suite="mlp", case="model step", provider=name, p50=time) for name, time in times.items()]
        assert list(model_table(steps).columns[5].cells) == ["1.00x", "2.00x", "1.00x", "1.00x", "1.50x", "0.50x"]

    def test_torchs_layers_again(self, monkeypatch, tmp_path):
        network = networks.Network(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), (4,), (8, 8))
        monkeypatch.setitem(networks.NETWORKS, "mlp", network)
        out = tmp_path / "out.json"
        result = call("--model", "mlp", "--quick", "--threads", "1", "--json", out, "--provider", "ours,eager again")
        assert result.exit_code == 0, result.output
        assert [row.provider for row in load(out)] == ["eager", "ours", "eager again"]

    def test_an_unknown_model(self):
        result = call("--model", "resnet51")
        assert (result.exit_code, "resnet18" in result.output) == (2, True)

    @pytest.mark.parametrize("name", networks.NETWORKS)
    def test_every_layer_of_a_network_is_converted_and_trains(self, name):
        network = networks.NETWORKS[name]
        layers = network.build()
        norms = sum(isinstance(module, _BatchNorm) for module in layers.modules())
        bn.convert(layers)
        assert sum(isinstance(module, bn.BatchNorm) for module in layers.modules()) == norms > 1
        layers(torch.randn(2, network.sample[0], *(min(size, 64) for size in network.sample[1:]))).sum().backward()
        assert all(parameter.grad is not None for parameter in layers.parameters())


def test_a_page_of_made_up_rows_says_what_held():
    text = render(made_up_rows(), "batchnorm bench --suite <made-up>")
    assert "1 of 1 targets held" in text
    assert "✓ held" in text
    assert "&lt;made-up&gt;" in text
    assert "0 of 1 targets held" in render(made_up_rows(ours=0.3), "-")


@pytest.mark.slow
def test_clones_are_timed_in_processes_of_their_own():
    clone = allocator.measure_clone(numel=1000, processes=1, clones=2)
    assert clone.faster == pytest.approx(clone.without_ms[1] / clone.with_ms[1], rel=1e-3)
    assert clone.bytes == 4000
    assert "times faster" in str(clone)


def test_the_table_of_means_shows_what_was_promised():
    console = Console(width=120, file=io.StringIO())
    for table in summary_tables(targets.summarize([*made_up_rows(), *made_up_rows(0.2)])):
        console.print(table)
    text = console.file.getvalue()
    assert "2.00 (≤1.3)" in text
    assert "5.00x (≥5)" in text
    assert "2.50x (≥3)" in text
    assert "missed" in text


def test_parts_are_measured_beside_plain_batch_normalization():
    one = case((6, 3, 4, 4), direction="step")
    given = tensors(one)
    names = [provider.name for provider in providers.find(["ours", "ghost", "renorm", "mask"])]
    assert names == ["copy", "eager", "ours", "ghost", "renorm", "mask"]
    with torch.enable_grad():
        plain = providers.Ours().prepare(one, given)()
        for provider in providers.SOURCES:
            found = provider.prepare(one, given)()
            assert [value.shape for value in found] == [value.shape for value in plain]
            assert not torch.equal(found[0], plain[0])
    assert all(provider.refuses(case(direction="inference")) for provider in providers.SOURCES)
    rows = next(run.run([one], providers.find(["ours", "mask"]), 0.01, 1))
    assert {row.provider: row.max_error is None for row in rows} == {
        "copy": True,
        "eager": False,
        "ours": False,
        "mask": True,
    }
