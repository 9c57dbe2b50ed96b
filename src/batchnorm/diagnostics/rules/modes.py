"""BN3: training and inference mode, and layers that should be frozen."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.rule import Found, Rule
from batchnorm.diagnostics.step import is_stopped


def _mates(case: Case) -> Iterator[Found]:
    change, names = case.mates
    if change > at.MATES and names:
        yield Found(
            tuple(names),
            {"relative_change": change},
            f"the output for a sample changes by {change:.1%} with the other samples of its batch",
        )


def _half_frozen(case: Case) -> Iterator[Found]:
    names = [
        norm.name
        for norm in case.norms
        if norm.updates and is_stopped(norm) and norm.module.training and norm.momentum != 0
    ]
    moved: list[str] = []
    if not case.arguments.missing(("loader", "step")) and case.runs:
        moved = case.stepped.moved
        names = [name for name in names if name in moved] + [name for name in moved if name not in names]
    if names:
        yield Found(
            tuple(names),
            {"layers": len(names)},
            "weight and bias do not learn, but the running statistics "
            + ("changed in the training step" if moved else "change with every batch in training mode"),
        )


def _validation(case: Case) -> Iterator[Found]:
    if case.validated:
        yield Found(
            tuple(case.validated),
            {"layers": len(case.validated)},
            "running statistics change inside validate(): it runs the model in training mode",
        )


def _woken(case: Case) -> Iterator[Found]:
    names = [name for name in case.stepped.woken if name not in case.stepped.moved]
    if names and case.model.training | any(norm.module.training for norm in case.norms):
        yield Found(
            tuple(names),
            {"layers": len(names)},
            "handed over in inference mode, but in training mode in the training step",
        )


RULES = (
    Rule(
        "BN301",
        "a prediction depends on its batch",
        "error",
        ("loader", "predict"),
        "In training mode, and without running statistics, a layer normalizes by the batch: the same sample gets "
        "another answer in another batch, "
        "and none alone. Measured by predicting the first sample of a batch again with other samples.",
        "model.eval()  # before predicting",
        "model.eval()  # before predicting",
        _mates,
    ),
    Rule(
        "BN302",
        "a freeze that does not hold",
        "warning",
        (),
        "requires_grad = False freezes weight and bias. The running statistics are buffers, and change with every "
        "forward in training mode.",
        "bn.freeze(model)",
        "layer.eval()  # again after every model.train()",
        _half_frozen,
        fixable=True,
    ),
    Rule(
        "BN303",
        "validation in training mode",
        "error",
        ("validate",),
        "torch.no_grad() does not stop the updates of running statistics. A validation in training mode normalizes by "
        "the batches of the "
        "validation data, and mixes their statistics into the model.",
        "model.eval()  # at the beginning of the validation, model.train() behind it",
        "model.eval()  # at the beginning of the validation, model.train() behind it",
        _validation,
    ),
    Rule(
        "BN304",
        "train() wakes layers that were in inference mode",
        "warning",
        ("loader", "step"),
        "model.train() sets the mode of every submodule, also of those that were put in inference mode to freeze them.",
        "bn.freeze(backbone)",
        "backbone.eval()  # again after every model.train()",
        _woken,
        fixable=True,
    ),
)
