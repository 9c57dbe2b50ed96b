"""A rule: a function that looks at a case and yields what it found, and its row in the table of rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Found(NamedTuple):
    """What a rule found, all layers of one cause together.

    Attributes:
        layers: names as in `named_modules`, worst first.
        evidence: the numbers.
        message: a sentence with the most important number.
        severity: if it differs from that of the rule.
    """

    layers: tuple[str, ...]
    evidence: Mapping[str, float | int | str]
    message: str
    severity: Severity | None = None


def worst_first(values: Mapping[str, float], above: float = -math.inf) -> list[str]:
    """The names whose value exceeds `above`, the largest first."""
    return sorted((name for name, value in values.items() if value > above), key=lambda name: -values[name])


@dataclass(frozen=True)
class Rule:
    """A row in the table of rules.

    Attributes:
        code: stable, BN and three digits; the first digit is the family.
        title: what is wrong, in a few words.
        severity: the worst it reports: "error" means that outputs are wrong, "warning" that it costs accuracy, "note" that it is
            harmless or a policy.
        needs: arguments of `diagnose` without which it cannot be asked; "a|b" is one of both, "criterion" stands for criterion or
            objective.
        why: what happens, why it matters, and how it is measured.
        remedy: a line of code with this library.
        with_torch: a line of code with torch alone.
        find: the function.
        fixable: whether `Diagnosis.fix` can mend it.
    """

    code: str
    title: str
    severity: Severity
    needs: tuple[str, ...]
    why: str
    remedy: str
    with_torch: str
    find: Callable[[Any], Iterable[Found]]
    fixable: bool = False

    @property
    def url(self) -> str:
        """The page that explains it."""
        return f"https://github.com/batchnorm/batchnorm/blob/main/docs/diagnose/{self.code}.md"
