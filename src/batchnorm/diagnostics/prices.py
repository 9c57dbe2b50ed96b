"""What a cause costs: loss and accuracy in inference as they are, and with the remedy applied to this cause alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.fix import MENDS
from batchnorm.diagnostics.formats import named
from batchnorm.diagnostics.measured import Measured, compared
from batchnorm.diagnostics.remedies import recalibrate_all
from batchnorm.errors import BatchNormError

Pair = tuple[Measured, Measured]


def priced(case: Case, finding: Finding) -> Finding:
    """The finding with what it costs, if a loss or an accuracy can be measured with its remedy."""
    price = _PRICES.get(finding.code)
    if (
        price is None or not case.can_measure or "momentum_of_twin" in finding.evidence
    ):  # momentum has no part in inference
        return finding
    try:
        before, after = price(case, finding)
    except BatchNormError:  # the remedy does not apply, for example since there is too little data
        return finding
    if after.loss is not None and not math.isfinite(after.loss):  # another fault hides this one
        return finding
    whole = _whole(case, finding, after) if finding.code in _RECALIBRATED else None
    evidence, texts = compared(before, after, whole)
    if not texts:
        return finding
    remedy = _TEXTS.get(finding.code, f"recalibrating {named(finding.layers)}{' alone' if whole else ''}")
    message = f"{finding.message}; {remedy} {' and '.join(texts)}"
    return replace(finding, evidence={**finding.evidence, **evidence}, message=message)


def _whole(case: Case, finding: Finding, after: Measured) -> Measured | None:
    """With all layers recalibrated; None if the finding names them all, or all the fault."""
    everything = {*finding.layers, *case.learning}
    if everything == set(finding.layers):
        return None
    whole = case.measured_with_pools(everything)
    worse = whole.loss is not None and after.loss is not None and whole.loss > after.loss
    return None if worse and finding.code == "BN201" else whole


def _pools(case: Case, finding: Finding) -> Pair:
    return case.measured, case.measured_with_pools(finding.layers)


def _layerwise(case: Case, _finding: Finding) -> Pair:
    before = case.measured
    with case.untouched():
        recalibrate_all(case)
        return before, case.measure()


def _mended(case: Case, finding: Finding) -> Pair:
    before = case.measured
    with case.untouched(*case.others):
        MENDS[finding.code].apply(case, finding)
        return before, case.measure()


def _twin(case: Case, finding: Finding) -> Pair:
    twin = case.arguments.twin
    assert twin is not None
    with case.untouched(twin):
        before = case.measure(twin)
    with case.untouched(twin):
        MENDS[finding.code].apply(case, finding)
        return before, case.measure(twin)


def _folded(case: Case, _finding: Finding) -> Pair:
    twin = case.arguments.twin
    assert twin is not None
    with case.untouched(twin):
        return case.measure(twin), case.measured


def _prediction(case: Case, _finding: Finding) -> Pair:
    """The user's prediction as it is, and the model in inference mode."""
    with case.untouched():
        return case.measure_prediction(), case.measured


_RECALIBRATED = ("BN101", "BN102", "BN201", "BN202", "BN203", "BN501")
_PRICES: dict[str, Callable[[Case, Finding], Pair]] = {
    **dict.fromkeys(_RECALIBRATED, _pools),
    "BN204": _layerwise,
    "BN301": _prediction,
    "BN601": _twin,
    "BN602": _mended,
    "BN603": _folded,
    "BN611": _mended,
}
_TEXTS = {
    "BN204": 'recalibrating with method="layerwise"',
    "BN301": "inference mode",
    "BN601": "recalibrating the twin",
    "BN602": "the twin's value",
    "BN603": "the original model in its place",
    "BN611": "one set of statistics for all replicas",
}
