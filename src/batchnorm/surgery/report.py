"""What an operation did to the batch norms of a model, counted and said."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from batchnorm.logs import logger

_NAMED = 3  # layers that a summary names beside each reason


@dataclass
class Report:
    """Which batch norms an operation changed, and why it left others.

    Attributes:
        operation: its name.
        done: what it does to them, as a participle.
        changed: names of layers.
        already: how many were so before.
        left: reasons, by the names of layers, or of modules that hold them.
        total: of the batch norms it looked at.
    """

    operation: str
    done: str
    changed: list[str] = field(default_factory=list)
    already: int = 0
    left: dict[str, str] = field(default_factory=dict)
    total: int = 0

    def leave(self, name: str, reason: str) -> None:
        """Note that a layer stays as it is."""
        self.left[name] = reason
        logger.info("%s: left %s: %s", self.operation, name, reason)

    def log(self) -> None:
        """Say it in one line: a warning if something was left, or if nothing changed."""
        parts = [f"{self.operation}: {len(self.changed)} of {self.total} batch norms {self.done}"]
        if not self.total:
            parts.append("the model has none")
        if self.already:
            parts.append(f"{self.already} already {'was' if self.already == 1 else 'were'}")
        reasons = dict[str, list[str]]()
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"left {', '.join(names[:_NAMED])}{more}: {reason}")
        warns = bool(self.left) or not self.changed
        logger.log(logging.WARNING if warns else logging.INFO, "%s", "; ".join(parts))
