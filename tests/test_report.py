"""A page of one experiment: verdicts follow the numbers, and the page needs nothing but itself."""

import dataclasses
import html
import re
from html.parser import HTMLParser

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
            "input.low": [(x, -1.0) for x, _ in course],
            "input": [(x, x / 100) for x, _ in course],
            "input.high": [(x, 1.0) for x, _ in course],
            "gradient": [(x, 1.0) for x, _ in course],
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
        assert not tags & {"script", "img", "iframe", "object", "embed", "audio", "video", "base", "form"}
        assert {value for tag, value in page.links if tag == "link"} == {"data:,"}
        for tag, value in page.links:
            if tag == "a":
                assert value.startswith("https://arxiv.org/abs/")
            elif tag != "link":
                assert value.startswith("#")
        addresses = set(re.findall(r"[a-z]+://[^\"'<\s]*", text))
        assert addresses == {value for tag, value in page.links if tag == "a"}
        assert "@import" not in text
        assert set(re.findall(r"url\((.)", text)) == {"#"}

    def test_four_plots_that_say_what_they_show(self, page):
        plots_shown = [attributes for tag, attributes in page.tags if tag == "svg"]
        assert len(plots_shown) == 4
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

    def test_plots_have_captions(self, text):
        text = html.unescape(text)
        for curve in demo.EXPERIMENT.curves.values():
            assert f"<figcaption><strong>{curve.title}.</strong> {curve.caption.split('(')[0].strip()}" in text

    def test_the_same_outcome_is_the_same_page(self, text):
        outcome = made_up_outcome()
        date = outcome.environment["date"]
        assert re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", date, text) == render(outcome)


class TestVerdict:
    def test_all_hold(self, text):
        assert text.count("✓ holds") == 4
        assert "On this machine 4 of 4 claims hold. Steps per seed: 10, 10 with BN; 20, 20 without." in text

    def test_the_opposite_is_said_as_plainly(self):
        text = render(made_up_outcome(good="plain"))
        assert text.count("✗ does not hold") == 4
        assert "On this machine 0 of 4 claims hold. Steps per seed: 20, 20 with BN; 10, 10 without." in text

    def test_one_seed_against_it_is_enough(self):
        def slow(arm, seed, measured):
            never = (arm, seed) == ("batch_norm", 1)
            return (
                dataclasses.replace(measured, values=measured.values | {"steps": float("inf")}) if never else measured
            )

        text = render(made_up_outcome(changed=slow))
        assert text.count("✓ holds") == 3
        assert "On this machine 3 of 4 claims hold. Steps per seed: 10, never with BN; 20, 20 without." in text

    def test_a_training_that_diverged_is_drawn_as_far_as_it_came(self):
        nan, inf = float("nan"), float("inf")
        short = {
            "course@0.1": [(0.0, 0.1), (5.0, 0.5), (10.0, 0.1)],
            "input.low": [(0.0, -0.5), (5.0, 0.0), (10.0, nan)],
            "input": [(0.0, 0.0), (5.0, 2.0), (10.0, nan)],
            "input.high": [(0.0, 0.5), (5.0, 9.0), (10.0, nan)],
            "gradient": [(0.0, 1.0), (5.0, 9.0), (10.0, inf)],
        }

        def diverged(arm, seed, measured):
            if arm == "batch_norm":
                return measured
            return Measured({**measured.values, "drift": inf}, {**measured.curves, **short})

        text = render(made_up_outcome(changed=diverged))
        assert "0.10, 0.10 with BN; never, never without." in text
        for told in ("learns: without BN 0.1 to 0.1;", "receives: without BN 0 to 2;", "is: without BN 1 to 9;"):
            assert told in text, told
