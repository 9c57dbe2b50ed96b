"""A finding: a rule, the layers that cause it, and the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchnorm.diagnostics.rule import Found, Rule, Severity


@dataclass(frozen=True)
class Finding:
    """One thing that batch norm does wrong in a model.

    Attributes:
        code: of the rule, such as "BN201".
        severity: "error" if outputs are wrong, "warning" if it costs accuracy, "note" if it is harmless or a policy.
        layers: the layers that cause it, names as in `named_modules` ("" is the model itself), worst first; empty if it is the loop.
        evidence: the measured numbers by name.
        message: what was found, in a sentence.
        remedy: a line of code with this library.
        with_torch: a line of code with torch alone.
        url: the page that explains the rule.
        fixable: whether `Diagnosis.fix` can mend it.
    """

    code: str
    severity: Severity
    layers: tuple[str, ...]
    evidence: Mapping[str, float | int | str]
    message: str
    remedy: str
    with_torch: str
    url: str
    fixable: bool = False


def finding_of(rule: Rule, found: Found) -> Finding:
    """What a rule found, with what its row says."""
    severity, evidence = found.severity or rule.severity, dict(found.evidence)
    texts = (found.message, rule.remedy, rule.with_torch, rule.url)
    return Finding(rule.code, severity, found.layers, evidence, *texts, rule.fixable)
