"""The report: verdicts follow the numbers, and the page needs nothing but itself."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch

from batchnorm.lab.data import Dataset, Examples
from batchnorm.lab.experiments import learning_rates
from batchnorm.lab.experiments.learning_rates import Plan
from batchnorm.lab.result import Training
from batchnorm.report import plots, rows
from batchnorm.report.page import render

EMPTY = Examples(torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64))
BATCH = Examples(torch.zeros(64, 1, 28, 28), torch.zeros(64, dtype=torch.int64))
DATASET = Dataset("<made-up> data", BATCH, EMPTY, EMPTY, fingerprint="")
PLAN = Plan(seeds=2, learning_rates=(0.01, 0.1, 1.0))


def made_up(arm, rate, seed, *, final, steps_to_target, drift):
    """A training of five measurements that ends at the accuracy `final`."""
    common = rate == learning_rates.COMMON
    return Training(
        arm=arm,
        seed=seed,
        learning_rate=rate,
        steps=[0, 5, 10, 15, 20],
        validation_accuracy=[0.1, 0.5, 0.7, 0.8, final],
        loss=[2.3, 1.0, 0.5, 0.3, 0.2],
        percentiles=[[-1.0, 0.0 + step / 100, 1.0] for step in range(5)] if common else [],
        gradient_norms=[[1.0, 0.5, 0.25]] * 5,
        drift=drift if common else None,
        steps_to_target=steps_to_target,
        test_accuracy=final - 0.01 * seed,
        seconds=1.0,
    )


def made_up_result(good="batch_norm"):
    """One arm trains at every learning rate, in 10 steps; the other only at 0.1, in 20."""
    trainings = []
    for arm in learning_rates.ARMS:
        for rate in PLAN.learning_rates:
            for seed in range(PLAN.seeds):
                if arm == good:
                    training = made_up(arm, rate, seed, final=0.98, steps_to_target=10, drift=0.1)
                else:
                    final = 0.96 if rate == 0.1 else 0.3
                    training = made_up(arm, rate, seed, final=final, steps_to_target=20, drift=2.0)
                trainings.append(training)
    return learning_rates.summarize(PLAN, DATASET, trainings, "batchnorm demo --seeds 2")


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
    return render(made_up_result())


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
        assert "&lt;made-up&gt; data" in text
        assert "<made-up>" not in text

    def test_it_tells_how_to_make_it_again(self, text):
        assert "<code>batchnorm demo --seeds 2</code>" in text
        assert f"torch {torch.__version__}" in text

    def test_the_same_result_is_the_same_page(self, text):
        result = made_up_result()
        again = render(result)
        date = result.environment["date"]
        assert re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", date, text) == again


class TestVerdict:
    def test_all_held(self, text):
        assert text.count("✓ held") == 4
        assert "On these images yes: 4 of 4 claims held" in text
        assert "trains at 3 of 3 learning rates, without it at 1" in text
        assert "comes to 95% after 10 steps with it, after 20 steps without" in text

    def test_the_opposite_is_said_as_plainly(self):
        result = made_up_result(good="plain")
        text = render(result)
        assert not any(claim.holds for claim in result.claims)
        assert text.count("✗ did not hold") == 4
        assert "On these images no: 0 of 4 claims held" in text

    def test_one_seed_against_it_is_enough(self):
        result = made_up_result()
        index = next(
            i for i, t in enumerate(result.trainings) if (t.arm, t.seed, t.learning_rate) == ("batch_norm", 1, 0.1)
        )
        slow = dataclasses.replace(result.trainings[index], steps_to_target=None)
        trainings = [*result.trainings[:index], slow, *result.trainings[index + 1 :]]
        changed = learning_rates.summarize(PLAN, DATASET, trainings, "")
        assert [claim.holds for claim in changed.claims] == [False, True, True, True]
        assert "10, never with BN; 20, 20 without" in changed.claims[0].evidence
        assert "On these images in part: 3 of 4" in render(changed)
        assert "comes to 95% with 1 of 2 seeds with it" in render(changed)

    def test_a_training_that_diverged_is_drawn_as_far_as_it_came(self):
        result = made_up_result()
        diverged = {
            "steps": [0, 5, 10],
            "validation_accuracy": [0.1, 0.5, 0.1],
            "loss": [2.3, 9.0, None],
            "percentiles": [[0.0, 1.0, 2.0], [0.0, 2.0, 9.0], [None, None, None]],
            "gradient_norms": [[1.0, 1.0, 1.0], [9.0, 9.0, 9.0], [None, None, None]],
            "drift": None,
        }
        trainings = [
            dataclasses.replace(t, **diverged) if (t.arm, t.learning_rate) == ("plain", 0.1) else t
            for t in result.trainings
        ]
        text = render(learning_rates.summarize(PLAN, DATASET, trainings, ""))
        assert "in widths of the first distribution: without BN diverged, diverged; with BN 0.10, 0.10." in text
        assert "nothing to show" not in text

    @pytest.mark.parametrize(
        "arms", [["plain"], pytest.param(["batch_norm"], marks=pytest.mark.slow), ["plain", "batch_norm"]], ids=str
    )
    @pytest.mark.parametrize("start", [[0.0, 1.0, 2.0], [None] * 3], ids=["finite", "not finite"])
    def test_a_training_that_diverged_at_once_leaves_nothing_to_show(self, arms, start):
        diverged = {
            "steps": [0, 1],
            "validation_accuracy": [0.1, 0.1],
            "loss": [None, None],
            "percentiles": [start, [None] * 3],
            "gradient_norms": [[None] * 3] * 2,
            "drift": None,
            "steps_to_target": None,
        }
        trainings = [
            dataclasses.replace(t, **diverged) if t.arm in arms and t.learning_rate == 0.1 else t
            for t in made_up_result().trainings
        ]
        result = learning_rates.summarize(PLAN, DATASET, trainings, "")
        assert plots.hidden_distribution(result).count("nothing to show") == len(arms)
        gradients = plots.gradient_norms(result)
        assert gradients.count("nothing to show") == len(arms)
        for arm in arms:
            assert f"{learning_rates.ARMS[arm]} diverged" in gradients
        assert render(result)


class TestRows:
    def test_the_headline_numbers(self):
        cells = {
            label: [cell.replace("\xa0", " ") for cell in row] for label, row in rows.summary_rows(made_up_result())
        }
        assert cells == {
            "Test accuracy, best learning rate": ["95.5 ± 0.7%", "97.5 ± 0.7%"],
            "Best learning rate (on validation)": ["0.1", "0.01"],
            "Test accuracy, learning rate 0.1": ["95.5 ± 0.7%", "97.5 ± 0.7%"],
            "Steps to 95%, learning rate 0.1": ["20 (20, 20)", "10 (10, 10)"],
            "Learning rates that train": ["0.1", "0.01 – 1"],
        }

    def test_nothing_trained_yet_is_a_dash(self):
        result = learning_rates.summarize(PLAN, DATASET, [], "")
        assert {cell for _, row in rows.summary_rows(result) for cell in row} == {rows.MISSING}

    @pytest.mark.parametrize(
        ("values", "expected"), [([None, None], "never"), ([5, None], "5, never"), ([5], "5"), ([5, 10], "8 (5, 10)")]
    )
    def test_steps(self, values, expected):
        assert rows.steps(values) == expected

    @pytest.mark.parametrize(("trains", "expected"), [([], "none"), ([1], "1"), ([1, 2], "1 – 2"), ([1, 3], "1, 3")])
    def test_a_range_has_no_gaps(self, trains, expected):
        assert rows.learning_rates(trains, [1, 2, 3]) == expected
