"""Counts and reports what an operation did to the batch norms of a model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from batchnorm.logs import logger

_NAMED = 3  # how many layers a summary names for each reason


@dataclass
class Report:
    """Which batch norms an operation changed, which it did not, and why.

    Attributes:
        operation: its name.
        done: the end of the sentence "n of m batch norms ...".
        changed: names of the changed layers.
        already: how many layers needed no change.
        left: why layers did not change, by their name or the name of a module that contains them.
        total: number of batch norms found.
    """

    operation: str
    done: str
    changed: list[str] = field(default_factory=list)
    already: int = 0
    left: dict[str, str] = field(default_factory=dict)
    total: int = 0

    def leave(self, name: str, reason: str) -> None:
        """Note that a layer does not change, and why."""
        self.left[name] = reason
        logger.info("%s: left %s: %s", self.operation, name, reason)

    def log(self) -> None:
        """Log the report in one line, as a warning if some layers or all did not change."""
        clauses = [f"{self.operation}: {len(self.changed)} of {self.total} batch norms {self.done}"]
        if not self.total:
            clauses.append("the model has none")
        if self.already:
            clauses.append(f"{self.already} already {'was' if self.already == 1 else 'were'}")
        reasons = dict[str, list[str]]()
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            clauses.append(f"left {', '.join(names[:_NAMED])}{more}: {reason}")
        warns = bool(self.left) or not self.changed
        logger.log(logging.WARNING if warns else logging.INFO, "%s", "; ".join(clauses))
