"""Checks one task on what a learner defined."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchnorm.language import Language, marked, speaking, tr
from batchnorm.learn.exercises.learner import Learner, NotDone, Nothing, Wrong
from batchnorm.learn.exercises.task import Task
from batchnorm.learn.exercises.tasks import TASKS

State = Literal["ok", "not done yet", "wrong"]
STATES: dict[State, str] = {"ok": marked("ok"), "not done yet": marked("not done yet"), "wrong": marked("wrong")}


@dataclass(frozen=True)
class Result:
    """What the check of a task found, in the language of the context.

    Attributes:
        number: the task.
        state: whether it is right.
        told: what is misunderstood, if it is wrong.
        printed: what the learner's code printed.
    """

    number: int
    state: State
    told: str = ""
    printed: str = ""

    def in_words(self) -> str:
        """State and what is misunderstood, in a line."""
        state = tr(STATES[self.state])
        return tr("{state}: {told}", state=state, told=self.told) if self.told else state


def judged(task: Task, namespace: Mapping[str, Any]) -> Result:
    """Check a task on a namespace, such as that of a file."""
    learner, printed = Learner(namespace), io.StringIO()
    with redirect_stdout(printed), warnings.catch_warnings(action="ignore"):
        try:
            if learner.is_template(_template(task), task.defines):
                raise NotDone
            task.check(learner)
        except NotDone:
            return Result(task.number, "not done yet")
        except Wrong as wrong:
            text = printed.getvalue()
            prints = isinstance(wrong, Nothing) and text
            told = tr("your code prints its result and returns None: return it") if prints else str(wrong)
            return Result(task.number, "wrong", told, text)
    return Result(task.number, "ok", printed=printed.getvalue())


def check(number: int, language: Language = "en") -> None:
    """Check a task in a notebook, on the variables of its cells, and print what was found."""
    with speaking(language):
        result = judged(TASKS[number], sys._getframe(1).f_globals)
        sys.stdout.write(f"{result.in_words()}\n")


def loaded(path: Path) -> dict[str, Any]:
    """What a learner's file defines.

    Raises:
        Wrong: the file raises, or is no Python.
    """
    namespace = dict[str, Any](__name__="exercise", __file__=str(path))
    learner = Learner(namespace)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        try:
            exec(compile(path.read_bytes(), str(path), "exec"), namespace)
        except NotImplementedError:
            pass  # a call of what is not done yet; the checks say so
        except SyntaxError as error:
            raise Wrong(tr("line {line} is no Python: {error}", line=error.lineno, error=error.msg)) from error
        except SystemExit as error:
            raise Wrong(tr("the file ends Python: leave out exit()")) from error
        except Exception as error:
            raise Wrong(learner.told(error)) from error
    return namespace


def _template(task: Task) -> dict[str, Any]:
    namespace = dict[str, Any](__name__="exercise")
    exec(task.template, namespace)
    return namespace
