"""The languages: every marked string has a Chinese entry with the same placeholders, and the language is chosen as documented."""

import ast
import string
from pathlib import Path

import pytest

import batchnorm
from batchnorm.language import catalog, columns, marked, preferred, speaking, spoken, tr, wrapped

ROOT = Path(batchnorm.__file__).parent


def strings(source: str) -> set[str]:
    """What a source marks for translation."""
    calls = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    first = [node.args[0] for node in calls if node.func.id in ("tr", "marked") and node.args]
    return {text.value for text in first if isinstance(text, ast.Constant)}


def in_the_code() -> set[str]:
    scripts = ROOT.parents[1] / "scripts"
    return {text for path in (*ROOT.rglob("*.py"), *scripts.glob("*.py")) for text in strings(path.read_text())}


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
    assert [columns(text) for text in ("x̂", "均值 µ", "，")] == [1, 6, 2]


def test_chinese_is_wrapped_between_characters_and_never_before_punctuation():
    text = "滑动统计量，记的是 running mean 与方差。"
    lines = wrapped(text, 12, indent="")
    assert max(map(columns, lines)) <= 14  # punctuation may stand out
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert not any(line.startswith(("，", "。")) for line in lines)
    assert wrapped("two words", 5, indent="") == ["two", "words"]
