"""The page of `batchnorm learn` in a browser: every control of every panel, both languages, light and dark, wide and narrow."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import batchnorm as bn
from batchnorm import files
from batchnorm.learn import page
from tests.test_report_browser import CHROMIUM, MODULES, NODE
from tests.test_report_browser import pytestmark as needs_browser

pytestmark = [needs_browser, pytest.mark.slow]
SCRIPT = Path(__file__).parent / "learn_browser.cjs"


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """What the browser met."""
    folder = tmp_path_factory.mktemp("learn")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, momentum=0.001))
    batches = [(5 + 3 * torch.randn(16, 3), torch.zeros(16)) for _ in range(4)]
    for inputs, _ in batches:
        model(inputs)
    found = bn.diagnose(model, batches)
    data = found.to_data()
    channel = {"channel": 0, "mean": 5.0, "deviation": 3.0, "running_mean": 0.25, "running_deviation": "inf"}
    data["layers"]["1"]["quantiles"] = [channel, {**channel, "channel": 3, "running_deviation": 1.5}]
    (folder / "diagnosis.json").write_text(files.to_json(data))
    (folder / "other.json").write_text("[1, 2]")
    (folder / "learn.html").write_text(page.render(), encoding="utf-8")
    command = [NODE, SCRIPT, CHROMIUM, *(folder / name for name in ("learn.html", "diagnosis.json", "other.json"))]
    environment = {**os.environ, "NODE_PATH": str(MODULES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "found": found}


def test_nothing_is_said_on_the_console_and_nothing_loaded(met):
    assert met["messages"] == []


def test_no_serious_violation_of_accessibility(met):
    assert met["violations"] == []


def test_it_never_scrolls_sideways(met):
    assert met["sideways"] == [0] * 4


def test_it_comes_in_both_languages(met):
    assert set(met["headings"]) == {page.strings(language)["frame"]["title"] for language in page.LANGUAGES}


def test_the_text_of_a_panel_follows_each_of_its_controls(met):
    assert met["still"] == []
    assert list(met["controls"]) == page.panels()
    assert min(met["controls"].values()) >= 1


def test_every_option_of_every_question_is_answered(met):
    assert len(met["feedback"]) >= 4 * 6 * len(page.panels())
    assert min(met["feedback"]) > 20


def test_the_address_shows_the_same_again(met):
    assert met["address"]["same"]
    assert (met["address"]["dark"], met["address"]["language"]) == ("dark", "zh-CN")
    assert met["address"]["length"] > 200


def test_a_diagnosis_is_shown_and_another_file_is_refused(met):
    codes = [each.code for each in met["found"].findings if page.panel_of(each.code) == "modes"]
    assert codes
    for code in codes:
        assert code in met["diagnosis"]["words"]
        assert code in met["diagnosis"]["figures"]
    assert "channel 3" in met["diagnosis"]["figures"]
    assert met["wrong"] == page.strings("en")["frame"]["diagnosis.not-diagnosis"].replace("`", "")


def test_figures_answer_to_the_pointer(met):
    assert re.search(r"0\.8\b", met["pointer"]["readout"])
    assert 0 <= float(met["pointer"]["dragged"]) < 0.75
    assert met["pointer"]["cell"] == "40"


def test_it_plays_and_pauses(met):
    assert met["play"]["start"] < met["play"]["stopped"] == met["play"]["later"]


def test_without_its_script_it_still_says_what_the_panels_teach(met):
    for panel in page.panels():
        assert page.strings("en")[panel]["title"] in met["without"]


def test_it_prints_figures_with_their_values(met):
    printed = met["print"]
    assert printed["sliders"] == printed["contents"] == 0
    assert printed["values"] >= len(page.panels())
    assert printed["words"] == printed["keep"] == len(page.panels())
