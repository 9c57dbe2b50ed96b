"""The documentation runs: Python blocks as they stand, one namespace a page; commands print what the page says they print."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pymdownx.slugs import slugify

from batchnorm.lab.experiment import ANSWERS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHINESE, ENGLISH = ROOT / "docs" / "zh", ROOT / "docs" / "tutorial"  # the chapters of the book
WITH_CODE = ("00", "01", "02", "03", "04", "05")  # chapters that show what runs
CHARACTERS = 15_000  # of Chinese, in all chapters
REPOSITORY = re.compile(
    r"https://(github\.com/batchnorm/batchnorm/blob|raw\.githubusercontent\.com/batchnorm/batchnorm)/main/"
)
QUICK = ("explain", "--version")  # commands that a test may run


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_blocks_run_and_print_what_is_shown(page, monkeypatch, tmp_path):
    """A `text` block that directly follows a `python` block is what the latter prints."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "docs"}
    printed = ""
    for language, source in blocks(page):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(source, str(page), "exec"), namespace)
            printed = out.getvalue()
        elif language == "text" and printed:
            assert same_but_rounding(printed.strip(), source.strip()), printed
            printed = ""


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?%?")


def same_but_rounding(printed: str, shown: str) -> bool:
    """The same text; percentages and numbers of three digits may differ a little, since trainings carry rounding on."""
    if " ".join(NUMBER.sub("0", printed).split()) != " ".join(NUMBER.sub("0", shown).split()):
        return False
    return all(map(close, NUMBER.findall(printed), NUMBER.findall(shown)))


def close(a: str, b: str) -> bool:
    if a[-1] == "%" or b[-1] == "%":
        return a[-1] == b[-1] and abs(float(a[:-1]) - float(b[:-1])) <= 3
    return a == b or (len(a) > 3 and float(a) == pytest.approx(float(b), rel=0.05))


def test_numbers_may_differ_by_rounding_only():
    assert same_but_rounding("drift=0.232, 4 layers, 97%", "drift=0.231, 4 layers, 96%")
    assert not same_but_rounding("drift=0.232", "drift=0.252")
    assert not same_but_rounding("drift=0.232, 4 layers", "drift=0.232, 5 layers")
    assert not same_but_rounding("drift=0.232", "shift=0.232")
    assert not same_but_rounding("97%", "92%")
    assert not same_but_rounding("97%", "97")


def commands(page: Path) -> list[tuple[str, str]]:
    """Command and shown output of the console blocks' quick commands."""
    found = []
    for language, source in blocks(page):
        if language != "console":
            continue
        for part in re.split(r"^\$ ", source, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            words = shlex.split(command)
            if words[0] == "batchnorm" and words[1] in QUICK:
                found.append((command, output))
    return found


@pytest.mark.parametrize(
    ("command", "shown"),
    [pytest.param(*found, id=f"{page.relative_to(ROOT)}-{found[0]}") for page in PAGES for found in commands(page)],
)
def test_commands_print_what_is_shown(command, shown):
    words = shlex.split(command)
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=True)
    lines = [line.rstrip() for line in shown.strip().splitlines()]
    printed = [line.rstrip() for line in done.stdout.strip().splitlines()]
    for part in " \n".join(lines).split("..."):  # an ellipsis leaves lines out
        assert part.strip(" \n").replace(" \n", "\n") in "\n".join(printed)


def links(page: Path) -> list[str]:
    """Targets of a page's links: in the text, in HTML, or defined at its end."""
    text = BLOCK.sub("", page.read_text())
    return re.findall(r"(?:\]\(|(?:href|src)=\"|^\[[^\]]+\]: )([^)\s\"]+)", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    return {
        slugify(case="lower")(re.sub(r"[`*]", "", heading), "-")
        for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        address, _, anchor = link.partition("#")
        if REPOSITORY.match(address):
            target = ROOT / REPOSITORY.sub("", address)
        elif link.startswith("http"):
            assert re.fullmatch(r"https?://[\w.-]+\.\w+(/[^\s]*)?", link), link
            continue
        else:
            target = page.parent / address if address else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_the_readme_renders_outside_the_repository():
    """On a package index a relative link leads nowhere, and a link without a definition is text in brackets."""
    assert [target for target in links(ROOT / "README.md") if not target.startswith("https://")] == []
    prose = re.sub(r"```.*?```|`[^`]*`|^    .*?$", "", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    definition = re.compile(r"^\[([^\]]+)\]: .*$", re.MULTILINE)
    used = re.findall(r"\[([^\]]+)\](?:\[([^\]]+)\])?(?!\()", definition.sub("", prose))
    defined = definition.findall(prose)
    assert {(key or text).lower() for text, key in used} == {*defined}
    assert len(defined) > 10


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 90
    first = text.splitlines()[:32]
    for part in ("√(variance + ε)", "pip install", "training:  tensor(", "![", "**Learning it?**"):
        assert any(part in line for line in first), part


def test_every_page_is_in_the_index():
    index, chinese = ((ROOT / "docs" / name).read_text() for name in ("index.md", "index.zh.md"))
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        if page.name not in ("index.md", "index.zh.md"):
            name = page.name.replace(".zh.md", ".md")
            assert f"({name})" in index, page.name
            assert f"({name})" in chinese, page.name
            assert name in navigation, page.name


def headings(page: Path) -> list[str]:
    """The levels and numbers of a page's headings, such as `## 2.1`; a heading without a number has its level alone."""
    text = BLOCK.sub("", page.read_text())
    return [f"{level} {number}" for level, number in re.findall(r"^(#+) (\d[\d.]*)?", text, re.MULTILINE)]


def test_the_book_has_the_same_chapters_and_sections_in_both_languages():
    chapters = [path.name for path in sorted(CHINESE.iterdir())]
    assert chapters == [path.name for path in sorted(ENGLISH.iterdir())]
    assert "glossary.md" in chapters
    for name in chapters:
        assert headings(CHINESE / name) == headings(ENGLISH / name), name


def test_every_chapter_can_be_reached():
    """By a link on a front page or on the first page of the book; the navigation lists the folder."""
    for folder, front in ((CHINESE, "index.zh.md"), (ENGLISH, "index.md")):
        pages = [ROOT / "docs" / front, folder / "00-start.md"]
        linked = {(page.parent / link.partition("#")[0]).resolve() for page in pages for link in links(page)}
        assert {*folder.iterdir()} <= linked


def test_code_and_figures_are_the_same_in_both_languages():
    """Comments and what is printed may differ in language."""
    figure = re.compile(r"\]\((\S+\.svg)\)")
    for chinese in CHINESE.iterdir():
        english = ENGLISH / chinese.name
        assert [language for language, _ in blocks(chinese)] == [language for language, _ in blocks(english)], (
            chinese.name
        )
        assert figure.findall(chinese.read_text()) == figure.findall(english.read_text()), chinese.name
        if chinese.name.startswith(WITH_CODE):
            assert "```python" in chinese.read_text(), chinese.name


def test_the_chinese_edition_is_a_book():
    text = "".join(path.read_text() for path in CHINESE.iterdir())
    assert len(re.findall(r"[\u4e00-\u9fff]", text)) >= CHARACTERS


def test_chinese_has_chinese_punctuation():
    """Outside of code, no comma, colon, semicolon, question mark or bracket of ASCII touches a Chinese character."""
    for page in (*CHINESE.iterdir(), *(ROOT / "docs").glob("*.zh.md")):
        text = re.sub(r"`[^`]*`|\]\([^)]*\)|^    .*?$", "`", BLOCK.sub("", page.read_text()), flags=re.MULTILINE)
        assert re.findall(r".{,12}(?:[\u4e00-\u9fff][,:;?!()]|[,:;?!()][\u4e00-\u9fff]).{,12}", text) == [], page.name


def script(path: str) -> Any:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_the_demonstration_measured():
    """Make it again with: python scripts/picture.py"""
    picture = script("scripts/picture.py")
    result = json.loads(picture.RESULT.read_text())
    for name, words in picture.WORDS.items():
        assert (picture.ASSETS / name).read_text() == picture.draw(result, words)


def test_the_figures_of_the_book_are_as_drawn():
    """Make them again with: python scripts/figures.py"""
    figures = script("scripts/figures.py")
    assert {name: (figures.ASSETS / name).read_text() for name in figures.DRAWINGS} == {
        name: draw() for name, draw in figures.DRAWINGS.items()
    }


def test_the_table_of_first_claims_has_the_verdicts_of_today():
    row = re.compile(r"^\| \[([\w.-]+)\]\((?:findings\.md)?#[^)]*\) \| (.*) \|$", re.MULTILINE)
    verdicts = dict[str, list[str]]()
    for name, cells in row.findall((ROOT / "docs" / "findings.md").read_text()):
        verdicts.setdefault(name, []).append(cells.split(" | ")[-1])
    counted = {
        name: ", ".join(f"{found.count(answer)} × *{answer}*" for answer in ANSWERS if answer in found)
        for name, found in verdicts.items()
    }
    assert {
        name: cells.split(" | ")[2] for name, cells in row.findall((ROOT / "docs" / "lab.md").read_text())
    } == counted


@pytest.mark.parametrize("name", script("benchmarks/never_slower.py").FILES)
def test_the_tables_of_layers_are_what_the_rows_say(name):
    """Make them again with: python benchmarks/never_slower.py"""
    table = script("benchmarks/never_slower.py").table(ROOT / "benchmarks" / "results" / f"{name}.csv")
    assert "\n".join(table) in (ROOT / "docs" / "kernels.md").read_text()


def test_the_table_of_training_steps_is_what_the_rows_say():
    """Make it again with: python benchmarks/steps.py"""
    steps = script("benchmarks/steps.py")
    assert "\n".join(steps.table(steps.read(steps.RESULTS))) in (ROOT / "docs" / "switching.md").read_text()


def test_the_page_of_models_is_what_the_rows_say():
    """Make it again with: make models"""
    models = script("benchmarks/models.py")
    result = json.loads((ROOT / "benchmarks" / "results" / "models.json").read_text())
    assert (ROOT / "docs" / "models.md").read_text() == models.page(result)
    assert not [row["name"] for row in result["rows"] if models.is_wrong(row)]
