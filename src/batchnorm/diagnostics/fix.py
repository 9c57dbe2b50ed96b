"""Mends what can be mended without a decision of the user: all or nothing, checked, and undone on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.finding import Finding
from batchnorm.diagnostics.measured import Measured
from batchnorm.diagnostics.norms import Norm
from batchnorm.diagnostics.probes import relative_difference
from batchnorm.diagnostics.record import in_inference
from batchnorm.diagnostics.remedies import pool_replicas, recalibrate_all
from batchnorm.diagnostics.state import Saved
from batchnorm.population import recalibrate
from batchnorm.surgery import convert, copy_statistics, freeze

_SAME_OUTPUT = 1e-4  # relative; removing a bias moves float32 outputs by rounding only


class Mend(NamedTuple):
    """How a rule is mended.

    Attributes:
        line: what is done, for readers.
        apply: does it, to the model of a case and the layers of a finding; returns the reason if it changed nothing.
        needs_loader: whether it reads the data.
    """

    line: str
    apply: Callable[[Case, Finding], str | None]
    needs_loader: bool = False


class Mended(NamedTuple):
    """A finding that was mended.

    Attributes:
        finding: what was found.
        line: what was done.
        before: loss and accuracy in inference before; None if they cannot be measured.
        after: the same afterwards.
    """

    finding: Finding
    line: str
    before: Measured | None
    after: Measured | None


class Outcome(NamedTuple):
    """What was done.

    Attributes:
        mended: an entry for each finding that was mended, in the order in which it was.
        left: a line for each that was not, with the reason.
        saved: the state before.
    """

    mended: tuple[Mended, ...]
    left: tuple[str, ...]
    saved: Saved


def mend(case: Case, findings: Iterable[Finding]) -> Outcome:
    """Mend findings of a model in place, in the order in which they depend on each other. An exception restores everything.

    Raises:
        Whatever the model or the loader raises.
    """
    saved, mended, left = Saved([case.model, *case.others]), list[Mended](), list[str]()
    done: Mended | None = None  # of all layers at once
    try:
        for finding in sorted(findings, key=lambda each: _order(each.code)):
            reason = _why_not(case, finding)
            fixed = MENDS.get(finding.code)
            if reason or fixed is None:
                left.append(f"{finding.code}: {reason}; {finding.remedy}")
                continue
            if fixed.apply is _recalibrate and done is not None:
                mended.append(done._replace(finding=finding, line=fixed.line))
                continue
            before = _measured(case, finding)
            reason = fixed.apply(case, finding)
            if reason:
                left.append(f"{finding.code}: {reason}; {finding.remedy}")
                continue
            mended.append(Mended(finding, fixed.line, before, _measured(case, finding)))
            if fixed.apply is _recalibrate:
                done = mended[-1]
    except BaseException:
        saved.restore()
        raise
    return Outcome(tuple(mended), tuple(left), saved)


def _measured(case: Case, finding: Finding) -> Measured | None:
    """Loss and accuracy of the model that a remedy mends."""
    if not case.can_measure:
        return None
    with case.untouched(*case.others):
        return case.measure(case.arguments.twin if finding.code == "BN601" else None)


def plan(case: Case, findings: Iterable[Finding]) -> Iterator[str]:
    """What `mend` would do."""
    for finding in sorted(findings, key=lambda each: _order(each.code)):
        if not _why_not(case, finding):
            yield f"{finding.code}: {MENDS[finding.code].line}"


def _order(code: str) -> int:
    return list(MENDS).index(code) if code in MENDS else len(MENDS)


def _why_not(case: Case, finding: Finding) -> str | None:
    if finding.code not in MENDS:
        return "it needs a decision of yours"
    if MENDS[finding.code].needs_loader and case.arguments.loader is None:
        return "it needs loader="
    if MENDS[finding.code].needs_loader and not case.items:
        return "no batch of the loader can be used"
    by_hand = any(norm.kind == "hand-written" for norm in _norms(case, finding))
    if by_hand and MENDS[finding.code].apply is not _recalibrate:
        return "the layer is hand-written"
    return None


def _norms(case: Case, finding: Finding) -> list[Norm]:
    return [norm for norm in case.norms if norm.name in finding.layers]


def _momentum(case: Case, finding: Finding) -> None:
    for norm in _norms(case, finding):
        norm.module.momentum = max(1 - (norm.momentum or 0), 1e-3)  # a momentum of 1 becomes that of 1000 batches


def _conventions(case: Case, finding: Finding) -> None:
    for norm in _norms(case, finding):
        for attribute in ("eps", "momentum"):
            value = finding.evidence.get(f"{attribute}_of_twin")
            if value is not None:
                setattr(norm.module, attribute, float(value))


def _freeze(case: Case, finding: Finding) -> None:
    for norm in _norms(case, finding):
        learns = any(value.requires_grad for value in norm.module.parameters(recurse=False))
        freeze(norm.module, affine=not learns)


def _float32(case: Case, finding: Finding) -> None:
    for norm in _norms(case, finding):
        layer: Any = convert(norm.module)  # torch's operators refuse float32 buffers with half parameters
        for name in ("running_mean", "running_var"):
            layer._buffers[name] = layer._buffers[name].float()


def _convert(case: Case, finding: Finding) -> None:
    for norm in _norms(case, finding):
        convert(norm.module)


def _recalibrate(case: Case, finding: Finding) -> None:
    recalibrate_all(case, finding.layers)


def _twin(case: Case, _finding: Finding) -> None:
    twin: nn.Module | None = case.arguments.twin
    assert twin is not None
    if case.arguments.loader is None:
        copy_statistics(case.model, twin)
    else:
        recalibrate(twin, case.items, forward=lambda model, item: case.call(item, model))


def _replicas(case: Case, _finding: Finding) -> None:
    replicas = case.arguments.replicas or []
    if case.arguments.loader is None:
        pool_replicas([case.model, *replicas])
        return
    recalibrate_all(case)
    for replica in replicas:
        copy_statistics(case.model, replica)


def _bias(case: Case, finding: Finding) -> str | None:
    """Move the biases before layers into their running means, and check that nothing else gets them."""
    saved = Saved([case.model])
    sources = {norm.name: case.record.layers[norm.name].source for norm in _norms(case, finding)}

    def output() -> Any:
        with case.untouched(), in_inference(case.inside), torch.no_grad():
            return case.call(case.items[0])

    before = output()
    for norm in _norms(case, finding):
        source: Any = case.inside.get_submodule(sources[norm.name] or "")
        bias, mean = source.bias.detach().double(), norm.tensor("mean")
        source.bias = None
        if mean is not None:
            with torch.no_grad():
                mean.copy_(mean.double() - bias)
    after = output()
    if isinstance(before, Tensor) and isinstance(after, Tensor) and relative_difference(before, after) <= _SAME_OUTPUT:
        return None
    saved.restore()
    return "the output before a layer goes elsewhere too, or outputs are no tensors that could be compared"


MENDS = {  # in the order in which they are applied: statistics last, since the others change what they are
    "BN101": Mend("momentum becomes 1 - momentum", _momentum),
    "BN602": Mend("eps and momentum become those of the twin", _conventions),
    "BN502": Mend("the layers become ours, whose buffers are float32", _float32),
    "BN705": Mend("the layers become ours, which update once per step", _convert),
    "BN302": Mend("the layers are frozen, buffers too", _freeze),
    "BN304": Mend("the layers are frozen, also after train()", _freeze),
    "BN501": Mend("running statistics are computed again from the data", _recalibrate, needs_loader=True),
    "BN203": Mend("running statistics are computed again from the data", _recalibrate, needs_loader=True),
    "BN202": Mend("running statistics are computed again from the data", _recalibrate, needs_loader=True),
    "BN201": Mend("running statistics are computed again from the data", _recalibrate, needs_loader=True),
    "BN611": Mend(
        "the replicas get one set of running statistics: of the data, or without a loader their pool", _replicas
    ),
    "BN703": Mend("the bias moves into the running mean", _bias, needs_loader=True),
    "BN601": Mend("the twin's running statistics are computed again, or copied without a loader", _twin),
}
