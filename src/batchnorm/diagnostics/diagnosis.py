"""The result of `diagnose`: findings, numbers of all layers, files, and `fix`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from batchnorm import files
from batchnorm.diagnostics import formats, page
from batchnorm.diagnostics.arguments import Arguments
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.fix import Mended, mend, plan
from batchnorm.diagnostics.progress import shown
from batchnorm.diagnostics.rules import RULES, matching
from batchnorm.diagnostics.state import Saved


@dataclass(frozen=True)
class Diagnosis:
    """What batch norm does wrong in a model. Its `str` is a table.

    Attributes:
        findings: worst first.
        layers: numbers of each batch norm by its name ("" is the model itself): kind, class, batches counted, and what was measured.
        not_asked: a line for each argument that would allow more rules, such as "pass predict= to ask BN301".
        batches: number of batches read from the loader.
        in_place: for a model without batch norm modules, what was seen in their place, a sentence; empty for others.
    """

    findings: tuple[Finding, ...]
    layers: Mapping[str, Mapping[str, Any]]
    not_asked: tuple[str, ...]
    batches: int
    _arguments: Arguments = field(repr=False)
    _again: Callable[[nn.Module], Diagnosis] = field(repr=False)
    in_place: str = ""

    @property
    def has_errors(self) -> bool:
        """Whether a finding has severity "error"."""
        return any(each.severity == "error" for each in self.findings)

    @property
    def summary(self) -> str:
        """The numbers of findings and layers, in a sentence."""
        counts = {
            severity: sum(each.severity == severity for each in self.findings)
            for severity in ("error", "warning", "note")
        }
        found = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items() if n) or "nothing found"
        layers = f"{len(self.layers)} batch norm{'' if len(self.layers) == 1 else 's'}"
        batches = f"{self.batches} batch{'' if self.batches == 1 else 'es'}"
        return (
            f"{found} in {layers}"
            + (f", {batches}" if self.batches else "")
            + (f": {self.in_place}" if self.in_place else "")
        )

    def __str__(self) -> str:
        return formats.to_text(self.findings, self.not_asked, self.summary)

    def to_data(self) -> dict[str, Any]:
        """The content of `to_json`."""
        return formats.to_data(self.findings, self.layers, self.not_asked, self.batches, self.in_place)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, completely or not at all; docs/diagnose.md describes the fields.

        Raises:
            InputError: the file cannot be written.
        """
        files.write(Path(path), files.to_json(self.to_data()))

    def to_sarif(self, path: str | os.PathLike[str]) -> None:
        """Write SARIF 2.1.0, in which layers are logical locations.

        Raises:
            InputError: the file cannot be written.
        """
        files.write(Path(path), files.to_json(formats.to_sarif(self.findings, RULES)))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained page.

        Raises:
            InputError: the file cannot be written.
        """
        files.write(Path(path), page.to_html(self.findings, self.layers, self.not_asked, self.summary))

    def plan(self, model: nn.Module, select: str | Iterable[str] | None = None) -> tuple[str, ...]:
        """What `fix` would do, a line for each finding.

        Raises:
            ArgumentError, InputError: as `fix`.
        """
        with shown():
            return tuple(plan(Case(model, self._arguments), self._selected(select)))

    def fix(self, model: nn.Module, select: str | Iterable[str] | None = None) -> Fixed:
        """Mend what can be mended without a decision of yours, in place, and measure again.

        Buffers of layers, eps and momentum change, layers may become ours (`convert`) or be frozen; trained parameters do not change,
        except a bias that has no effect. BN601 mends the twin, BN611 the replicas too.
        It is a transaction: an exception leaves everything as it was.

        Args:
            model: the model that was diagnosed, or one with the same names.
            select: codes, or beginnings of codes, to mend; None is all.

        Raises:
            ArgumentError: if model is not a module.
            InputError: if no rule has such a code.
        """
        with shown():
            outcome = mend(Case(model, self._arguments), self._selected(select))
            try:
                after = self._again(model)
            except BaseException:
                outcome.saved.restore()
                raise
        still = {each.code for each in after.findings}
        changes = tuple(_change(each, each.finding.code in still) for each in outcome.mended)
        return Fixed(changes, outcome.left, after, outcome.saved)

    def _selected(self, select: str | Iterable[str] | None) -> list[Finding]:
        codes = None if select is None else matching(select)
        return [each for each in self.findings if codes is None or each.code in codes]


@dataclass(frozen=True)
class Change:
    """What `Diagnosis.fix` did about a finding.

    Attributes:
        code: of the finding.
        layers: its layers.
        done: what was done.
        gone: whether the rule is silent, asked again.
        evidence: loss_before, loss_after, accuracy_before and accuracy_after in inference, as far as they can be measured: of the model,
            for BN601 of the twin.
    """

    code: str
    layers: tuple[str, ...]
    done: str
    gone: bool
    evidence: Mapping[str, float]

    def __str__(self) -> str:
        texts = [f"{self.code}: {self.done}"]
        for name, show in (("accuracy", "{:.1%}"), ("loss", "{:.3g}")):
            before, after = (self.evidence.get(f"{name}_{when}") for when in ("before", "after"))
            if before is not None and after is not None:
                texts.append(f"{name} {show.format(before)} -> {show.format(after)}")
        return ", ".join([*texts, *([] if self.gone else ["still found"])])


def _change(mended: Mended, found_again: bool) -> Change:
    evidence = dict[str, float]()
    for when, value in (("before", mended.before), ("after", mended.after)):
        for name, number in (("loss", value and value.loss), ("accuracy", value and value.accuracy)):
            if number is not None:
                evidence[f"{name}_{when}"] = number
    return Change(mended.finding.code, mended.finding.layers, mended.line, not found_again, evidence)


@dataclass(frozen=True)
class Fixed:
    """What `Diagnosis.fix` did.

    Attributes:
        changes: an entry for each finding that was mended, with loss and accuracy before and after.
        left: a line for each that was not: the reason and the remedy.
        diagnosis: measured again.
    """

    changes: tuple[Change, ...]
    left: tuple[str, ...]
    diagnosis: Diagnosis
    _saved: Saved = field(repr=False)

    @property
    def done(self) -> tuple[str, ...]:
        """A line for each finding that was mended, as `Diagnosis.plan` has them."""
        return tuple(f"{each.code}: {each.done}" for each in self.changes)

    def undo(self) -> None:
        """Restore the model, the twin and replicas as they were before, bit for bit. What was trained in between is lost."""
        self._saved.restore()

    def __str__(self) -> str:
        lines = [*(f"did: {each}" for each in self.changes), *(f"left: {line}" for line in self.left)]
        return "\n".join([*lines, str(self.diagnosis)])
