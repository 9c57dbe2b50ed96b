"""A task: what it asks, what the learner writes, hints, and the check that names what is misunderstood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from batchnorm.language import tr, wrapped
from batchnorm.learn.exercises.learner import Learner

_WIDTH = 110


@dataclass(frozen=True)
class Task:
    """One of the ten tasks.

    Attributes:
        number: from 1 to 10.
        name: the name of its template and its solution.
        title: its title, in English.
        statement: what to do, as paragraphs, in English.
        defines: the names that the learner defines.
        hints: from a nudge to nearly the answer, in English.
        check: raises `Wrong` with what is misunderstood.
    """

    number: int
    name: str
    title: str
    statement: tuple[str, ...]
    defines: tuple[str, ...]
    hints: tuple[str, ...]
    check: Callable[[Learner], None]

    @property
    def file_name(self) -> str:
        """The file that `batchnorm learn start` writes."""
        return f"{self.number:02d}_{self.name}.py"

    @property
    def template(self) -> str:
        """The code to begin with."""
        return self._code("templates")

    @property
    def solution(self) -> str:
        """Code that passes the check."""
        return self._code("solutions")

    def _code(self, folder: str) -> str:
        return (
            resources.files("batchnorm.learn.exercises").joinpath(folder, f"{self.name}.py").read_text(encoding="utf-8")
        )

    def file(self) -> str:
        """The template below the statement, in the language of the context."""
        title = tr("Task {number}: {title}", number=self.number, title=tr(self.title))
        told = "\n\n".join(_filled(tr(paragraph)) for paragraph in self.statement)
        check = tr("Check it with: batchnorm learn check {file}", file=self.file_name)
        return f'"""{title}\n\n{told}\n\n{check}\n"""\n\n{self.template}'


def _filled(paragraph: str) -> str:
    """A paragraph in lines; formulas, which are indented, stay as they are."""
    return paragraph if paragraph.startswith(" ") else "\n".join(wrapped(paragraph, _WIDTH, indent=""))
