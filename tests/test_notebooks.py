"""The exercises as notebooks: each is what the script writes, with the outputs that its cells have here."""

import pytest

pytest.importorskip("nbclient", reason="the notebooks need the extra dev: pip install -e '.[dev]'")

import nbformat

from batchnorm.language import LANGUAGES, speaking, tr
from batchnorm.learn.exercises.tasks import TASKS
from tests.test_docs import script


@pytest.fixture(scope="module")
def notebooks():
    return script("scripts/notebooks.py")


@pytest.fixture(scope="module")
def kernel(notebooks):
    with notebooks.kernel() as client:
        yield client


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_notebook_is_what_its_cells_give(task, language, notebooks, kernel):
    """Make them again with: python scripts/notebooks.py"""
    stored = nbformat.read(notebooks.path_of(task, language), as_version=4)
    nbformat.validate(stored)
    assert stored == notebooks.executed(notebooks.notebook(task, language), kernel)
    outputs = ["".join(output.text for output in cell.outputs) for cell in stored.cells if cell.cell_type == "code"]
    with speaking(language):
        assert outputs == ["", tr("not done yet") + "\n", "", tr("ok") + "\n"]


def test_no_notebook_is_left_over(notebooks):
    expected = {notebooks.path_of(task, language) for task in TASKS.values() for language in LANGUAGES}
    assert set(notebooks.FOLDER.rglob("*.ipynb")) == expected
