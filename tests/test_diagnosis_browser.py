"""The page of a diagnosis in a browser: values at the pointer and by keyboard, sorting, filters, thousands of layers, accessibility."""

import json
import os
import re
import subprocess

import pytest
from torch import nn

import batchnorm as bn
from batchnorm.diagnostics.page import to_html
from tests.sick_models import images, lagging
from tests.test_report_browser import CHROMIUM, MODULES, NODE, ROOT, pytestmark

__all__ = ["pytestmark"]  # the browser checks are skipped where there is no browser
MANY = 5000


def row(place: int) -> dict:
    """A made-up layer whose drift grows with its place."""
    channel = {"channel": 3, "mean": place / MANY, "deviation": 1.0, "running_mean": 0.0, "running_deviation": 1.0}
    measured = {"drift": place / MANY, "drift_in_inference": 0.5, "effective_samples": 64.0, "gradient": 0.1}
    return {"order": place, "class": "BatchNorm1d", **measured, "quantiles": [channel] * 5}


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """What the browser met on the pages of a model with two faults and of one with thousands of layers."""
    folder = tmp_path_factory.mktemp("pages")
    pages = [folder / "small.html", folder / "large.html"]
    inner = lagging().model
    inner[1].momentum = 0.9
    model = nn.ModuleDict({"<i>net</i>": inner})
    loss = nn.CrossEntropyLoss()
    found = bn.diagnose(
        model,
        images(),
        forward=lambda _, item: inner(item[0]),
        objective=lambda _, item: loss(inner(item[0]), item[1]),
    )
    found.to_html(pages[0])
    pages[1].write_text(to_html((), {f"layer.{place}": row(place) for place in range(MANY)}, (), "nothing found"))
    command = [NODE, ROOT / "tests" / "diagnosis_browser.cjs", CHROMIUM, *pages]
    environment = {**os.environ, "NODE_PATH": str(MODULES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return dict(zip(("small", "large"), json.loads(done.stdout), strict=True))


@pytest.fixture(params=["small", "large"])
def page(met, request):
    return met[request.param]


def test_nothing_is_said_on_the_console_and_nothing_loaded(page):
    assert page["messages"] == []


def test_no_serious_violation_of_accessibility(page):
    assert page["violations"] == []


def test_no_page_scrolls_sideways(page):
    assert page["sideways"] == [0, 0]


def test_every_plot_answers_to_pointer_and_keyboard(page):
    assert len(page["plots"]) == 3
    for each in page["plots"]:
        assert re.search(r"\d", each["hover"])
        assert each["left"] == ""
        assert each["first"] != each["text"]
        assert each["announced"].replace("; ", "\n") == each["text"]


def test_plots_name_the_layers(met):
    first, second = (met["small"]["plots"][0][key].splitlines()[0] for key in ("first", "text"))
    assert (first, second) == ("1: <i>net</i>.1", "2: <i>net</i>.4")


def test_layers_with_errors_come_first(met):
    assert met["small"]["first"] == {"names": ["<i>net</i>.4", "<i>net</i>.1"], "count": "2 layers"}
    assert met["small"]["errors"] == ["<i>net</i>.4"]


def test_a_column_is_sorted_by_click_and_by_keyboard(page):
    assert [each["order"] for each in page["sorts"]] == ["descending", "ascending", "descending"]
    assert page["sorts"][0] == page["sorts"][2]
    assert page["sorts"][0]["names"] != page["sorts"][1]["names"]
    assert page["sorted"] == 1


def test_rows_are_filtered_by_text(page):
    assert page["first"]["names"][0] in page["filtered"]["names"]
    assert len(page["filtered"]["names"]) < len(page["first"]["names"])
    assert page["none"] == {"names": [], "told": "No layer fits."}


def test_the_values_of_a_row_are_told_at_the_pointer_and_by_keyboard(page):
    assert re.search(r"channel \d+: batches .* ± .*, running .* ± ", page["hover"])
    assert page["focused"] == {"told": page["hover"], "pictures": 1}
    assert page["below"] != page["hover"]
    assert page["end"]["stops"] == 1


def test_thousands_of_layers_are_shown_by_pages(met):
    large = met["large"]
    assert large["first"]["count"] == "1 to 100 of 5,000"
    assert large["sorts"][1]["names"] == [f"layer.{place}" for place in range(100)]
    assert large["next"]["count"] == "101 to 200 of 5,000"
    assert large["next"]["names"][0] == "layer.4899"
    assert not met["small"]["turn"]


def test_the_page_is_complete_without_its_script(met):
    assert [page["without"]["rows"] for page in met.values()] == [2, MANY]
    assert [page["without"]["inputs"] for page in met.values()] == [0, 0]
    text = met["small"]["without"]["text"]
    for part in ("BN201", "bn.recalibrate(model, loader)", "Figure 1. Drift.", "<i>net</i>.4", "pass predict="):
        assert part in text
