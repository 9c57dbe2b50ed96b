"""Writes the ten exercises as notebooks, in English and in Chinese, executed: `python scripts/notebooks.py`.

A notebook has the task, a cell to fill in, a check, the hints, and a solution that passes. Its texts and its code are those of
`batchnorm.learn.exercises`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode, v4

from batchnorm.language import LANGUAGES, Language, speaking, tr
from batchnorm.learn.exercises.task import Task
from batchnorm.learn.exercises.tasks import TASKS

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def path_of(task: Task, language: Language) -> Path:
    """The notebook's file."""
    return FOLDER / language / f"{Path(task.file_name).stem}.ipynb"


def notebook(task: Task, language: Language) -> NotebookNode:
    """The notebook of a task, not executed."""
    with speaking(language):
        title = tr("Task {number}: {title}", number=task.number, title=tr(task.title))
        statement = "\n\n".join(map(tr, task.statement))
        hints = "\n".join(
            f"<details><summary>{tr('Hint {place}', place=place)}</summary>\n\n{tr(hint)}\n\n</details>\n"
            for place, hint in enumerate(task.hints, 1)
        )
        fill_in = tr("Fill in this cell, then run it and the check below.")
        solution = tr("A solution")
    said = "" if language == "en" else f', "{language}"'
    cells = [
        v4.new_markdown_cell(f"# {title}\n\n{statement}\n\n{fill_in}"),
        v4.new_code_cell(task.template.strip()),
        v4.new_code_cell(f"from batchnorm.learn.exercises import check\n\ncheck({task.number}{said})"),
        v4.new_markdown_cell(f"{hints}\n## {solution}"),
        v4.new_code_cell(task.solution.strip()),
        v4.new_code_cell(f"check({task.number}{said})"),
    ]
    for place, cell in enumerate(cells, 1):
        cell.id = f"cell-{place}"
    return v4.new_notebook(cells=cells, metadata=METADATA)


def executed(book: NotebookNode, kernel: NotebookClient) -> NotebookNode:
    """The notebook with the outputs of its cells, numbered from 1. The kernel forgets what earlier notebooks defined."""
    kernel.nb = v4.new_notebook(cells=[v4.new_code_cell("%reset -f")])
    kernel.execute_cell(kernel.nb.cells[0], 0)
    kernel.nb = book
    code = [place for place, cell in enumerate(book.cells) if cell.cell_type == "code"]
    for number, place in enumerate(code, 1):
        kernel.execute_cell(book.cells[place], place, execution_count=number)
    return book


@contextmanager
def kernel() -> Iterator[NotebookClient]:
    """One kernel for all notebooks, so that torch is imported once."""
    client = NotebookClient(v4.new_notebook(), timeout=60, kernel_name="python3", record_timing=False)
    with client.setup_kernel():
        yield client


def main() -> None:
    """Write all notebooks."""
    with kernel() as client:
        for language in LANGUAGES:
            for task in TASKS.values():
                path = path_of(task, language)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(nbformat.writes(executed(notebook(task, language), client)) + "\n", encoding="utf-8")
                print(f"Wrote {path.relative_to(FOLDER.parent.parent)}.")


if __name__ == "__main__":
    main()
