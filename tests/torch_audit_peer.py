"""What torch-audit, the nearest neighbor of `diagnose`, finds in the same gallery. Run: python -m tests.torch_audit_peer

It audits a training of four steps. It takes no inference code, no validation, and no second model, so faults of those cannot be seen.
"""

import copy
import warnings
from itertools import islice

import torch

import batchnorm as bn
from tests.sick_models import GALLERY, Patient, images

STEPS = 4
ADVICE = "TA2"  # the family of rules about speed on a GPU, which are not about faults


def audited(patient: Patient) -> set[str]:
    """The codes of its warnings and errors in a training."""
    from torch_audit import Severity, audit_dynamic

    arguments, model = patient.arguments, patient.model
    loss = arguments.get("criterion")
    optimizer = arguments.get("optimizer") or torch.optim.SGD(model.parameters(), 0.01)
    settings = {"every_n_steps": 1, "reporters": [], "suppress_internal_errors": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with audit_dynamic(model, optimizer=optimizer, **settings) as auditor:
            for item in islice(copy.deepcopy(arguments.get("loader") or images(STEPS)), STEPS):
                x, target = item if isinstance(item, (tuple, list)) else (item, None)
                try:
                    auditor.audit_data(x)
                    output = auditor.forward(x)
                    scalar = loss(output, target) if loss and target is not None else output.float().square().mean()
                    auditor.backward(scalar)
                    auditor.optimizer_step()
                except (RuntimeError, ValueError):  # such as one value per channel: training itself says it
                    break
                optimizer.zero_grad()
        found = auditor.finish(report=False).findings
    serious = (each.rule_id for each in found if each.severity >= Severity.WARN)
    return {code for code in serious if not code.startswith(ADVICE)}


def diagnosed(patient: Patient) -> set[str]:
    """The codes of what `diagnose` finds, with notes."""
    return {each.code for each in bn.diagnose(patient.model, **patient.arguments).findings}


def serious(patient: Patient) -> set[str]:
    """The codes of its warnings and errors."""
    found = bn.diagnose(patient.model, **patient.arguments).findings
    return {each.code for each in found if each.severity != "note"}


def measured() -> dict[str, tuple[list[str], list[str]]]:
    """By tool: the sick models that it tells from their healthy twins, and the healthy twins with a warning or an error."""
    audits = {code: (audited(pair.sick()), audited(pair.healthy())) for code, pair in GALLERY.items()}
    mine = {code: (diagnosed(pair.sick()), diagnosed(pair.healthy())) for code, pair in GALLERY.items()}
    return {
        "torch-audit": (
            [code for code, (sick, healthy) in audits.items() if sick - healthy],
            [code for code, (_, healthy) in audits.items() if healthy],
        ),
        "diagnose": (
            [code for code, (sick, healthy) in mine.items() if sick - healthy],
            [code for code, pair in GALLERY.items() if serious(pair.healthy())],
        ),
    }


def main() -> None:
    """Print both counts for both tools."""
    torch.manual_seed(0)
    for tool, (found, flagged) in measured().items():
        print(f"{tool}: found {len(found)} of {len(GALLERY)} sick models ({', '.join(found) or 'none'})")  # noqa: T201
        print(f"{tool}: flagged {len(flagged)} of {len(GALLERY)} healthy twins ({', '.join(flagged) or 'none'})")  # noqa: T201


if __name__ == "__main__":
    main()
