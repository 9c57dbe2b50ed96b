"""A page of one experiment: verdicts follow the numbers, and the page needs nothing but itself."""

import base64
import dataclasses
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from batchnorm.lab.experiment import Measured, Setting
from batchnorm.lab.experiments import demo
from batchnorm.lab.result import Outcome
from batchnorm.lab.unit import Finished, Unit
from batchnorm.report import plots
from batchnorm.report.lab import render_one

COMMAND = "batchnorm demo --data '<made-up>' --seeds 2"


def made_up(seed, *, end, steps, drift):
    """Measurements at three learning rates, of which the common one is measured five times."""
    course = [(0.0, 0.1), (5.0, 0.5), (10.0, 0.7), (15.0, 0.8), (20.0, max(end))]
    rates = (0.01, demo.COMMON, 1.0)
    return Measured(
        values={
            "accuracy": max(end) - 0.01 * seed,
            "best_rate": demo.COMMON,
            "common_accuracy": end[1],
            "steps": steps,
            "rates": sum(share >= demo.TARGET for share in end),
            "drift": drift,
        },
        curves={
            **{f"course@{rate:g}": course for rate in rates},
            "sweep": list(zip(rates, end, strict=True)),
            "validation": list(zip(rates, end, strict=True)),
            "drift": [(x, x / 100) for x, _ in course],
        },
    )


def made_up_outcome(good="batch_norm", changed=lambda arm, seed, measured: measured):
    """One arm trains at every learning rate, in 10 steps; the other only at 0.1, in 20."""
    finished = []
    for arm in demo.ARMS:
        for seed in range(2):
            if arm == good:
                measured = made_up(seed, end=(0.98, 0.98, 0.98), steps=10.0, drift=0.1)
            else:
                measured = made_up(seed, end=(0.3, 0.96, 0.3), steps=20.0, drift=2.0)
            finished.append(Finished(Unit("demo", arm, Setting(seed)), changed(arm, seed, measured), 1.0))
    return Outcome.of(demo.EXPERIMENT, 2, finished, COMMAND)


def render(outcome):
    return render_one(demo.EXPERIMENT, outcome)


class Page(HTMLParser):
    """What a browser would load, and what a reader is told."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in {"src", "href", "srcset", "data", "action"}:
                self.links.append((tag, value))


@pytest.fixture(scope="module")
def text():
    return render(made_up_outcome())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


class TestPage:
    def test_it_loads_nothing(self, text, page):
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"img", "iframe", "object", "embed", "audio", "video", "base", "form"}
        assert not any("src" in attributes for tag, attributes in page.tags if tag == "script")
        assert {value for tag, value in page.links if tag == "link"} == {"data:,"}
        for tag, value in page.links:
            if tag == "a":
                assert value.startswith(("https://arxiv.org/abs/", "#"))
            elif tag != "link":
                assert value.startswith("#")
        addresses = set(re.findall(r"[a-z]+://[^\"'<\s]*", text))
        assert addresses - {"http://www.w3.org/2000/svg"} == {
            value for tag, value in page.links if tag == "a" and not value.startswith("#")
        }
        assert "@import" not in text
        assert set(re.findall(r"url\((.)", text)) == {"#"}

    def test_only_the_script_of_the_package_may_run(self, text):
        (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
        assert script == (Path(plots.__file__).parent / "page.js").read_text()
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in text

    def test_the_contents_lead_to_every_section(self, text):
        contents = text[text.index("<nav") : text.index("</nav>")]
        assert re.findall(r'href="#([^"]+)"', contents) == re.findall(r'<section id="([^"]+)"', text)

    def test_plots_that_say_what_they_show(self, page):
        plots_shown = [attributes for tag, attributes in page.tags if tag == "svg"]
        assert len(plots_shown) == 3
        for attributes in plots_shown:
            assert attributes["role"] == "img"
            assert "without BN" in attributes["aria-label"]
            assert "width" not in attributes
            assert "viewbox" in attributes

    def test_the_drawings_do_not_share_names(self, text, page):
        assert len(page.ids) == len(set(page.ids))
        used = set(re.findall(r"url\(#([^)]+)\)", text)) | {
            value[1:] for _, value in page.links if value.startswith("#")
        }
        assert used <= set(page.ids)

    def test_colors_follow_light_and_dark(self, text):
        drawings = text[text.index("<svg") :]
        assert "prefers-color-scheme: dark" in text
        for placeholder, variable in plots.VARIABLES.items():
            assert placeholder not in text
            assert f"var({variable})" in drawings or variable.startswith("--series")  # of more arms than two
            assert text.count(f"{variable}:") == 2  # once light, once dark
        assert not re.search(r"#[0-9a-fA-F]{6}\b", drawings)
        assert "font-family" not in drawings

    def test_what_comes_from_outside_is_escaped(self, text):
        assert "&lt;made-up&gt;" in text
        assert "<made-up>" not in text

    def test_it_tells_how_to_make_it_again(self, text):
        assert "<code>batchnorm demo --data &#x27;&lt;made-up&gt;&#x27; --seeds 2</code>" in text
        assert f"torch {torch.__version__}" in text

    def test_plots_have_numbers_and_captions(self, text):
        text = html.unescape(text)
        for number, curve in enumerate(demo.EXPERIMENT.curves.values(), start=1):
            start = (
                f"<figcaption><strong>Figure {number}. {curve.title}.</strong> {curve.caption.split('(')[0].strip()}"
            )
            assert start in text
            assert f'<figure id="demo-figure-{number}">' in text

    def test_the_same_outcome_is_the_same_page(self, text):
        outcome = made_up_outcome()
        date = outcome.environment["date"]
        assert re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", date, text) == render(outcome)


def embedded(text):
    """The data of each plot."""
    return [json.loads(each) for each in re.findall(r'<script type="application/json">(.*?)</script>', text)]


class TestData:
    def test_every_training_is_in_the_page(self, text):
        course = embedded(text)[0]
        items = course["frames"]["items"]
        assert [item["value"] for item in items] == ["0.01", "0.1", "1"]
        assert course["frames"]["label"] == "learning rate"
        assert items[course["frames"]["first"]]["value"] == f"{demo.COMMON:g}"
        outcome = made_up_outcome()
        for item in items:
            for arm, series in zip(demo.ARMS, item["series"], strict=True):
                assert (series["arm"], series["label"]) == (arm, demo.ARMS[arm])
                for measured, seed in zip(outcome.by_arm[arm], series["seeds"], strict=True):
                    assert seed == [[x, y] for x, y in measured.curves[f"course@{item['value']}"] if x > 0]

    def test_the_axes_are_those_of_the_picture(self, text):
        drawing, sweep = text.split("<svg")[2], embedded(text)[1]
        series = sweep["series"][1]
        x, y = sweep["x"], sweep["y"]

        def place(axis, value):
            low, high, value = (math.log10(each) if axis["log"] else each for each in (*axis["values"], value))
            start, end = axis["places"]
            return start + (value - low) / (high - low) * (end - start)

        line = re.findall(r'<g data-line="batch_norm">\s*<path d="(M[^"]*L[^"]*)"', drawing)[-1]
        drawn = [tuple(map(float, point.split())) for point in re.split("[ML]", line)[1:]]
        for (px, py), point in zip(drawn, series["points"], strict=True):
            assert (px, py) == pytest.approx((place(x, point[0]), place(y, point[1])), abs=0.01)

    def test_what_belongs_to_an_arm_can_be_switched(self, text):
        for drawing in text.split("<svg")[1:4]:
            for arm in demo.ARMS:
                assert drawing.count(f'data-line="{arm}"') == 2  # band and mean
                assert drawing.count(f'data-legend="{arm}"') == 2  # line and label

    def test_a_training_that_ended_early_is_told(self):
        def diverged(arm, seed, measured):
            short = {"course@1": [(0.0, 0.1), (7.0 + seed, 0.1)]} if arm == "plain" else {}
            return Measured(measured.values, {**measured.curves, **short})

        *others, last = embedded(render(made_up_outcome(changed=diverged)))[0]["frames"]["items"]
        assert {item["note"] for item in others} == {""}
        assert last["note"] == "without BN: the loss of 2 of 2 seeds is no longer finite at step 7, 8"

    def test_a_curve_of_one_point_is_a_dot_for_each_seed(self):
        def quick(arm, seed, measured):
            return Measured(measured.values, {**measured.curves, "sweep": [(0.1, 0.9 + seed / 100)]})

        text = render(made_up_outcome(changed=quick))
        assert "Figure 2. Which learning rates train: learning rate 0.1." in text
        sweep = embedded(text)[1]
        assert sweep["along"] == "y"
        assert sweep["series"][0]["points"] == [[0.9, 0, "0.9, 0.91"], [0.91, 0, ""]]
        assert sweep["y"]["names"] == {"0": "without BN", "-1": "with BN"}

    def test_data_cannot_end_its_element(self):
        label = "</script><b>"
        answers = plots.Answers(label, "x", [plots.Series("a", label, plots.INK, [(1.0, 2.0, 2.0, 2.0)])])
        plot = plots.plot("name", label, lambda figure: figure.subplots(), (2, 2), answers)
        assert "<" not in plot.data
        assert json.loads(plot.data)["title"] == label


class TestVerdict:
    def test_all_hold(self, text):
        assert text.count("✓ holds") == 4
        assert "On this machine 4 of 4 claims hold (default, 2 seeds; mean ± standard deviation)." in text
        assert text.count("Steps per seed: 10, 10 with BN; 20, 20 without.") == 1

    def test_the_opposite_is_said_as_plainly(self):
        text = render(made_up_outcome(good="plain"))
        assert text.count("✗ does not hold") == 4
        assert "On this machine 0 of 4 claims hold" in text
        assert "Steps per seed: 20, 20 with BN; 10, 10 without." in text

    def test_one_seed_against_it_is_enough(self):
        def slow(arm, seed, measured):
            never = (arm, seed) == ("batch_norm", 1)
            return (
                dataclasses.replace(measured, values=measured.values | {"steps": float("inf")}) if never else measured
            )

        text = render(made_up_outcome(changed=slow))
        assert text.count("✓ holds") == 3
        assert "On this machine 3 of 4 claims hold" in text
        assert "Steps per seed: 10, never with BN; 20, 20 without." in text

    def test_a_training_that_diverged_is_drawn_as_far_as_it_came(self):
        nan, inf = float("nan"), float("inf")
        short = {
            "course@0.1": [(0.0, 0.1), (5.0, 0.5), (10.0, 0.1)],
            "drift": [(0.0, 0.0), (5.0, 2.0), (10.0, nan)],
        }

        def diverged(arm, seed, measured):
            if arm == "batch_norm":
                return measured
            return Measured({**measured.values, "drift": inf}, {**measured.curves, **short})

        text = render(made_up_outcome(changed=diverged))
        assert "0.10, 0.10 with BN; never, never without." in text
        for told in ("learns: without BN 0.5 to 0.1;", "moves: without BN 0 to 2;"):
            assert told in text, told
