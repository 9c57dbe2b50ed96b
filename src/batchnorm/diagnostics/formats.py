"""A diagnosis as text, JSON and SARIF."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.rule import Rule
from batchnorm.files import plain
from batchnorm.version import __version__

SCHEMA = 1  # of the JSON; it rises if a field changes its meaning or goes
_LEVELS = {"error": "error", "warning": "warning", "note": "note"}
_MOST_LAYERS = 4  # names in a line
_SARIF = "https://raw.githubusercontent.com/oasis-tcs/sarif-spec/main/sarif-2.1/schema/sarif-schema-2.1.0.json"
ROOT = "the model"  # what readers see in place of its name, ""


def named(layers: Sequence[str], most: int = _MOST_LAYERS) -> str:
    """Names of layers in a line."""
    shown = [layer or ROOT for layer in layers[:most]]
    more = len(layers) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def number(value: float | int | str) -> str:
    """A number of the evidence."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def to_text(findings: Sequence[Finding], not_asked: Iterable[str], summary: str, width: int = 110) -> str:
    """A table: code, severity, layers, and below what was found, the numbers and the remedy."""
    lines = list[str]()
    for each in findings:
        lines.append(f"{each.code}  {each.severity:<7}  {named(each.layers) or 'the training loop'}")
        evidence = ", ".join(f"{name}={number(value)}" for name, value in each.evidence.items())
        for text in (each.message, evidence, f"remedy: {each.remedy}"):
            lines += textwrap.wrap(text, width, initial_indent=" " * 16, subsequent_indent=" " * 18)
    lines += [summary, *not_asked]
    return "\n".join(lines)


def to_data(
    findings: Sequence[Finding],
    layers: Mapping[str, Mapping[str, Any]],
    not_asked: Sequence[str],
    batches: int,
    in_place: str,
) -> dict[str, Any]:
    """The data of the JSON; NaN and infinities are strings."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "batches": batches,
        "findings": [
            {
                "code": each.code,
                "severity": each.severity,
                "layers": list(each.layers),
                "evidence": {name: plain(value) for name, value in each.evidence.items()},
                "message": each.message,
                "remedy": each.remedy,
                "with_torch": each.with_torch,
                "url": each.url,
                "fixable": each.fixable,
            }
            for each in findings
        ],
        "layers": {name: {key: plain(value) for key, value in row.items()} for name, row in layers.items()},
        "not_asked": list(not_asked),
        "in_place": in_place,
    }


def to_sarif(findings: Sequence[Finding], rules: Sequence[Rule]) -> dict[str, Any]:
    """SARIF 2.1.0; a layer is a logical location."""
    places = {rule.code: place for place, rule in enumerate(rules)}
    return {
        "$schema": _SARIF,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "batchnorm diagnose",
                        "version": __version__,
                        "informationUri": "https://github.com/batchnorm/batchnorm",
                        "rules": [
                            {
                                "id": rule.code,
                                "shortDescription": {"text": rule.title},
                                "fullDescription": {"text": rule.why},
                                "help": {"text": rule.remedy},
                                "helpUri": rule.url,
                                "defaultConfiguration": {"level": _LEVELS[rule.severity]},
                            }
                            for rule in rules
                        ],
                    }
                },
                "results": [
                    {
                        "ruleId": each.code,
                        "ruleIndex": places[each.code],
                        "level": _LEVELS[each.severity],
                        "message": {"text": f"{each.message}. Remedy: {each.remedy}"},
                        "locations": [
                            {
                                "logicalLocations": [
                                    {"name": layer or ROOT, "fullyQualifiedName": layer or ROOT, "kind": "module"}
                                ]
                            }
                            for layer in each.layers
                        ],
                        "properties": {name: plain(value) for name, value in each.evidence.items()},
                    }
                    for each in findings
                ],
            }
        ],
    }
