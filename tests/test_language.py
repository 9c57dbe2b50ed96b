"""The languages: every marked string has a Chinese entry with the same placeholders, and the language is chosen as documented."""

import ast
import json
import re
import string
from pathlib import Path

import pytest
from click.testing import CliRunner
from matplotlib.font_manager import findfont, get_font

import batchnorm
from batchnorm.cli import commands
from batchnorm.explain import explain
from batchnorm.lab import experiments
from batchnorm.lab.result import load
from batchnorm.lab.translated import texts, translated
from batchnorm.language import catalog, marked, preferred, speaking, spoken, text_width, tr, wrapped
from batchnorm.report.lab import render
from batchnorm.report.plots import _EM_WIDE, _restored, drawable

ROOT = Path(batchnorm.__file__).parent
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "lab"


def strings(source: str) -> set[str]:
    """What a source marks for translation."""
    calls = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    first = [node.args[0] for node in calls if node.func.id in ("tr", "marked") and node.args]
    return {text.value for text in first if isinstance(text, ast.Constant)}


def in_the_code() -> set[str]:
    scripts = ROOT.parents[1] / "scripts"
    found = {text for path in (*ROOT.rglob("*.py"), *scripts.glob("*.py")) for text in strings(path.read_text())}
    return found | {text for name in experiments.NAMES for text in texts(experiments.load(name))}


def placeholders(text: str) -> list[str]:
    return sorted(f"{name}:{form}" for _, name, form, _ in string.Formatter().parse(text) if name is not None)


def test_every_marked_string_has_an_entry_and_no_entry_is_left_over():
    marks = in_the_code()
    assert sorted(marks - catalog("zh").keys()) == []
    assert sorted(catalog("zh").keys() - marks) == []


def test_marked_strings_are_found():
    assert strings("tr('a {b}', b=1)\nx = marked('c' 'd')\ntr(x)\nf('e')") == {"a {b}", "cd"}


def test_placeholders_are_those_of_the_english():
    wrong = [text for text, chinese in catalog("zh").items() if placeholders(text) != placeholders(chinese)]
    assert wrong == []
    assert placeholders("{b} {a:g}") == placeholders("{a:g}{b}") != placeholders("{a}{b}")


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "C", "BATCHNORM_LANG": "zh"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "BATCHNORM_LANG": "en"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
    ],
)
def test_the_environment_chooses(environment, language):
    assert preferred(environment) == language


def test_a_context_speaks_and_ends():
    assert tr("ok") == "ok"
    with speaking("zh"):
        assert spoken() == "zh"
        assert tr("ok") == "正确"
        assert tr("no such string {a}", a=1) == "no such string 1"
        assert marked("ok") == "ok"
    assert spoken() == "en"


def test_chinese_characters_take_two_columns():
    assert [text_width(text) for text in ("x̂", "均值 µ", "，")] == [1, 6, 2]


def test_chinese_is_wrapped_between_characters_and_never_before_punctuation():
    text = "滑动统计量，记的是 running mean 与方差。"
    lines = wrapped(text, 12, indent="")
    assert max(map(text_width, lines)) <= 14  # punctuation may stand out
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert not any(line.startswith(("，", "。")) for line in lines)
    assert wrapped("two words", 5, indent="") == ["two", "words"]


def test_a_translated_experiment_has_the_same_parts():
    """Two claims with one translation would be one claim."""
    for name in experiments.NAMES:
        experiment = experiments.load(name)
        with speaking("zh"):
            chinese = translated(experiment)
        for part in ("claims", "arms", "metrics", "curves"):
            assert len(getattr(chinese, part)) == len(getattr(experiment, part))
        assert len(set(chinese.arms.values())) == len(set(experiment.arms.values()))
        assert translated(experiment) == experiment


@pytest.mark.slow
def test_the_report_is_chinese_in_text_figures_and_data():
    known = [(experiments.load(name), load(name, RESULTS)) for name in experiments.NAMES]
    english = render(known)
    with speaking("zh"):
        chinese = render(known)
    assert '<html lang="en">' in english
    assert '<html lang="zh-Hans">' in chinese
    assert re.search(r"[\u4e00-\u9fff]", english) is None
    assert not re.search(f"[{_EM_WIDE}]", chinese)
    figures = re.findall(r"<svg.*?</svg>", chinese, re.DOTALL)
    assert all(re.search(r"<text[^>]*>[^<]*[\u4e00-\u9fff]", svg) for svg in figures)
    sentences = re.sub(r"<(style|script|code).*?</\1>|<[^>]*>", " ", chinese, flags=re.DOTALL)
    assert re.findall(r"[a-z]{2,} [a-z]{2,} [a-z]{2,} [a-z]{2,}", sentences) == []
    assert json.loads(re.search(r'id="words">(.*?)</script>', chinese)[1])["show"] == "显示"


def test_chinese_labels_take_an_em_a_character():
    assert drawable("loss at step 3") == "loss at step 3"
    words = ["步", "学习率", "步数", "准确率 0.1，验证"]
    assert [len(drawable(word)) for word in words] == list(map(len, words))
    assert [_restored(drawable(word)) for word in words] == words
    font = get_font(findfont("DejaVu Sans"))
    font.set_size(100, 72)
    for character in _EM_WIDE:
        font.set_text(character)
        assert font.get_width_height()[0] / 64 == pytest.approx(100, abs=18), character  # with the space around it


def test_what_programs_read_stays_english(tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(commands, ["--lang", "zh", *map(str, arguments)])

    listed = invoke("lab", "list", "--json", "--out", RESULTS)
    assert listed.exit_code == 0
    assert re.search(r"[\u4e00-\u9fff]", listed.stdout) is None
    page = tmp_path / "findings.md"
    assert invoke("lab", "findings", "--out", RESULTS, "--page", page).exit_code == 0
    assert re.search(r"[\u4e00-\u9fff]", page.read_text()) is None


@pytest.mark.parametrize("where", ["option", "command", "variable"])
def test_explain_speaks_chinese(where):
    arguments = {"option": ["--lang", "zh", "explain"], "command": ["explain", "--lang", "zh"], "variable": ["explain"]}
    variables = {"BATCHNORM_LANG": "zh" if where == "variable" else "en"}
    done = CliRunner().invoke(commands, [*arguments[where], "0.8", "1.2", "0.9", "1.1"], env=variables)
    assert done.exit_code == 0
    assert "  标准差  √(σ² + ε)            = 0.158146\n" in done.output
    with speaking("zh"):
        explanation = explain([0.8, 1.2, 0.9, 1.1])
        assert str(explanation) + "\n" == done.output
        assert max(map(text_width, explanation.text(width=60).splitlines())) <= 62
    assert "standard deviation" in str(explanation)
