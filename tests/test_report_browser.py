"""The pages of reports in a browser: values at the pointer and by keyboard, switches, the slider, and accessibility, light and dark."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from batchnorm.lab import experiments, result
from batchnorm.lab.experiments import demo
from batchnorm.language import speaking
from batchnorm.report.lab import render, render_one
from tests.test_report import made_up_outcome

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = shutil.which("node")
MODULES = ROOT / "build" / "browser" / "node_modules"
PAGES = ("demo", "lab", "chinese")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and NODE and (MODULES / "axe-core").exists()),
    reason="needs Chromium and node, and playwright-core and axe-core: make site-check installs them into build/browser",
)


@pytest.fixture(scope="module")
def met(tmp_path_factory):
    """What the browser met on a page of the demonstration, on one of the lab, and on a Chinese one of the lab."""
    folder = tmp_path_factory.mktemp("pages")
    pages = [folder / f"{name}.html" for name in PAGES]
    pages[0].write_text(render_one(demo.EXPERIMENT, made_up_outcome()))
    known = [(demo.EXPERIMENT, made_up_outcome())]
    for name in ("regularization", "corruption"):  # dots, and the widest table
        known.append((experiments.load(name), result.load(name, ROOT / "benchmarks" / "results" / "lab")))
    known.append((experiments.load("cost"), None))
    pages[1].write_text(render(known))
    with speaking("zh"):
        pages[2].write_text(render(known))
    command = [NODE, ROOT / "tests" / "report_browser.cjs", CHROMIUM, *pages]
    environment = {**os.environ, "NODE_PATH": str(MODULES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip(PAGES, json.loads(done.stdout), strict=True))


@pytest.fixture(params=["demo", "lab"])
def page(met, request):
    return met[request.param]


@pytest.fixture(params=PAGES)
def any_page(met, request):
    return met[request.param]


def test_nothing_is_said_on_the_console_and_nothing_loaded(any_page):
    assert any_page["messages"] == []


def test_no_serious_violation_of_accessibility(any_page):
    assert any_page["violations"] == []


def test_no_page_scrolls_sideways(any_page):
    assert any_page["sideways"] == [0, 0]


def test_no_label_of_a_figure_is_cut(any_page):
    assert any_page["cut"] == []


def test_no_table_is_wider_than_a_telephone(any_page):
    assert any_page["wide"] == []


def test_a_chinese_page_answers_in_chinese(met):
    sweep = met["chinese"]["plots"][1]
    assert sweep["first"] == "学习率 0.01\n不用 BN 0.3\n用 BN 0.98"
    assert met["chinese"]["seed"]["values"]["first"].count("种子 0: 0.5") == 2
    for text in ("✓ 成立", "用更少的步数达到 95%", "图 1　学得有多快。", "重现命令"):
        assert text in met["chinese"]["without"]["text"]


def test_every_plot_answers_to_pointer_and_keyboard(met):
    assert [len(page["plots"]) for page in met.values()] == [3, 5, 5]
    for each in (plot for page in met.values() for plot in page["plots"]):
        assert re.search(r"\d", each["hover"])
        assert each["left"] == ""
        assert re.search(r"\d", each["first"])
        assert re.search(r"\d", each["text"])
        assert each["text"] != each["first"]
        assert each["announced"].replace("; ", "\n") == each["text"]
        assert each["marks"] >= 1


def test_values_are_those_of_the_measurements(met):
    sweep = met["demo"]["plots"][1]
    assert sweep["first"] == "learning rate 0.01\nwithout BN 0.3\nwith BN 0.98"
    assert sweep["text"] == "learning rate 0.1\nwithout BN 0.96\nwith BN 0.98"


def test_arms_can_be_switched(page):
    arm = page["arm"]
    assert arm["label"] == "without BN"
    assert (arm["before"], arm["after"], arm["again"]) == (6, 0, 6)  # a line and a band in each of three plots
    assert "without BN" not in arm["values"]["text"]
    assert "with BN" in arm["values"]["text"]


def test_seeds_can_be_switched(page):
    assert page["seed"]["drawn"] == 6  # both arms in each of three plots
    assert page["seed"]["values"]["first"].count("seed 0: 0.5") == 2


def test_the_slider_reaches_the_other_trainings(page):
    assert page["slider"] == {"value": "1", "drawn": 2, "lines": 0}


def test_the_page_is_complete_without_its_script(page):
    assert page["without"]["inputs"] == 0
    assert page["without"]["pictures"] == len(page["plots"])
    for text in ("✓ holds", "It reaches 95% validation accuracy", "Figure 1. How fast it learns.", "Make it again"):
        assert text in page["without"]["text"]
