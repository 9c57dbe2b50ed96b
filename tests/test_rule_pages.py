"""The pages of the rules say what the code says, and their examples show the fault and its end; test_docs runs them."""

import re

import pytest

from batchnorm.diagnostics import RULES, rule_of, thresholds
from tests.sick_models import GALLERY
from tests.test_docs import REPOSITORY, ROOT, blocks, script

FOLDER = ROOT / "docs" / "diagnose"
COUNTED = {"BN407", "BN705"}  # torch can correct the weight of updates, not their number
PAGES = script("scripts/diagnose_page.py")


def printed(page) -> list[str]:
    return [source for language, source in blocks(page) if language == "text"]


def test_the_index_has_every_rule_as_it_is():
    """Make it again with: python scripts/diagnose_page.py"""
    assert PAGES.page(PAGES.INDEX.read_text()) == PAGES.INDEX.read_text()
    assert {path.stem for path in FOLDER.glob("BN*.md")} == {rule.code for rule in RULES} == set(GALLERY)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_page_has_its_rule_as_it_is(rule):
    """Make it again with: python scripts/diagnose_page.py"""
    path = PAGES.page_of(rule)
    assert PAGES.page(path.read_text(), rule) == path.read_text()
    assert ROOT / REPOSITORY.sub("", rule.url) == path


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_an_example_is_sick_and_mended(rule):
    page = PAGES.page_of(rule)
    sick, *mended = printed(page)
    assert re.search(rf"^{rule.code}  (error|warning|note)", sick, re.MULTILINE)
    assert len(mended) == 1 + ("With torch alone:" in page.read_text().partition("## Example")[2])
    for text in mended[: 1 if rule.code in COUNTED else None]:
        assert "nothing found" in text
        assert f"\n{rule.code}  " not in f"\n{text}"
    assert "## Known false alarms" in page.read_text()


def test_thresholds_are_those_that_the_rules_read():
    assert PAGES.thresholds_of(rule_of("BN101").find) == ["MOMENTUM"]
    assert "COPY_DISTANCE" in PAGES.thresholds_of(rule_of("BN601").find)  # in a function that the rule calls
    assert PAGES.thresholds_of(rule_of("BN303").find) == []
    assert all(
        f"`{name}` | {getattr(thresholds, name):g} |" in (FOLDER / "BN201.md").read_text() for name in ("DRIFT_ERROR",)
    )
    assert PAGES.comments().keys() == {name for name in vars(thresholds) if name.isupper()}


def test_examples_are_run_anew():
    page = "```python\nprint(1 + 1)\n```\n\n```text\n?\n```\n\n```python\nx = 3\n```\n"
    assert PAGES.run(page, "page") == page.replace("?", "2")


def test_the_gallery_has_ten_models_each_with_a_finding_and_the_numbers_after_it():
    text = (ROOT / "docs" / "diagnose-gallery.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) == 10
    for section in sections:
        assert re.search(r"^BN\d{3}  (error|warning)", section, re.MULTILINE), section[:40]
        assert section.count("```text") == 2, section[:40]
