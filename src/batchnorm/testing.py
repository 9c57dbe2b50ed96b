"""Helpers for the tests of your project."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from batchnorm.diagnostics import Diagnosis, diagnose
from batchnorm.diagnostics.formats import to_text
from batchnorm.diagnostics.rule import SEVERITIES, Severity
from batchnorm.errors import InputError


def assert_healthy(
    model: nn.Module, loader: Iterable[Any] | None = None, *, severity: Severity = "warning", **arguments: Any
) -> Diagnosis:
    """Fail if `diagnose` finds something, and return the diagnosis otherwise.

        def test_batch_norms():
            bn.testing.assert_healthy(model, loader, criterion=nn.CrossEntropyLoss(), ignore="BN703")

    Args:
        model: as for `diagnose`.
        loader: as for `diagnose`; None asks only the rules that need no data.
        severity: the least that fails: "error", "warning" (errors too) or "note" (everything).
        arguments: those of `diagnose`, such as `criterion`, `predict`, `select` and `ignore`.

    Raises:
        AssertionError: with the table of the findings.
        InputError: on an unknown severity.
        Whatever `diagnose` raises.
    """
    __tracebackhide__ = True  # pytest shows the line of the test, not of this function
    if severity not in SEVERITIES:
        raise InputError(f"severity must be one of {', '.join(map(repr, SEVERITIES))}, but got {severity!r}")
    diagnosis = diagnose(model, loader, **arguments)
    failing = SEVERITIES[: SEVERITIES.index(severity) + 1]
    found = [each for each in diagnosis.findings if each.severity in failing]
    if found:
        codes = ", ".join(dict.fromkeys(each.code for each in found))
        code = found[0].code
        advice = f'`batchnorm diagnose --explain {code}` explains it; ignore="{code}" accepts it'
        raise AssertionError(f"{type(model).__name__}: {codes}\n{to_text(found, [advice], diagnosis.summary)}")
    return diagnosis
