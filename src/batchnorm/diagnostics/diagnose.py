"""`diagnose`: asks every rule that the arguments allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from batchnorm.diagnostics.absent import seen_in_place
from batchnorm.diagnostics.arguments import Arguments
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.diagnosis import Diagnosis
from batchnorm.diagnostics.finding import Finding, finding_of
from batchnorm.diagnostics.layers import layer_rows
from batchnorm.diagnostics.prices import priced
from batchnorm.diagnostics.progress import shown
from batchnorm.diagnostics.rule import SEVERITIES, Rule
from batchnorm.diagnostics.rules import chosen
from batchnorm.errors import ArgumentError, InputError
from batchnorm.population.items import check_loader

_CALLABLES = ("criterion", "objective", "forward", "predict", "validate", "step")


def diagnose(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    objective: Callable[[nn.Module, Any], Tensor] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    optimizer: Optimizer | None = None,
    predict: Callable[[nn.Module, Any], Any] | None = None,
    validate: Callable[[nn.Module], Any] | None = None,
    step: Callable[[nn.Module, Any], Any] | None = None,
    twin: nn.Module | None = None,
    replicas: Iterable[nn.Module] | None = None,
    select: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
) -> Diagnosis:
    """Find what batch norm does wrong in a model, where and by how much.

        print(bn.diagnose(model))  # what the layers say, without running the model
        print(bn.diagnose(model, loader, criterion=nn.CrossEntropyLoss(), optimizer=optimizer))

    It knows the batch norms of torch and of this library with their subclasses, frozen ones of other libraries, and hand-written ones
    with gamma, beta and running statistics. Each argument allows more rules; `Diagnosis.not_asked` lists the others. The guide,
    docs/diagnose.md, explains every rule.

    The model is afterwards as before, bit for bit, also if something raises: parameters, buffers, gradients, modes, hooks, attributes,
    the states of optimizers that took a step, and random numbers of Python, NumPy and torch. In training mode each module keeps its
    mode; if the model is in inference mode, all modules are put in training mode to measure batches.

    Args:
        model: any module; inside data-parallel and compiled wrappers, the module that they wrap is run.
        loader: yields batches as for `recalibrate`: a tensor, a tuple (input, target), a dict of keyword arguments. The first 64 are read,
            once; those that fit into 256 MiB are kept for measurements of more than one pass.
        criterion: called as `criterion(output, target)`, where the target is `item[1]`; returns a scalar.
        objective: called as `objective(model, item)`, in place of criterion; returns a scalar.
        forward: called as `forward(model, item)`; the default calls the model with a tensor, the first of a tuple, or keyword arguments.
        optimizer: that of the training.
        predict: your inference, `predict(model, x)`, whose first output tensor has a row for each sample of x.
        validate: your validation, `validate(model)`.
        step: your training step, `step(model, item)`.
        twin: a model that should agree: an average of the weights, a target network, a folded model, the origin of a port.
        replicas: the models of other ranks or clients.
        select: codes of the rules to ask, or beginnings of codes such as "BN2"; a string with commas or a list. None is all.
        ignore: codes not to ask, in the same form.

    Raises:
        ArgumentError: if an argument is of the wrong kind.
        InputError: if no rule has a code of `select` or `ignore`, or the loader yields nothing.
        Whatever model, loader and the functions raise.
    """
    if loader is not None:
        check_loader(loader, several_passes=False)
    given = {
        "criterion": criterion,
        "objective": objective,
        "forward": forward,
        "predict": predict,
        "validate": validate,
        "step": step,
    }
    for name, value in given.items():
        if value is not None and not callable(value):
            raise ArgumentError(f"{name} must be callable, but got {type(value).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"optimizer must be a torch.optim.Optimizer, but got {type(optimizer).__name__}")
    others = None if replicas is None else list(replicas)
    for name, value in (("twin", twin), *(("replicas", each) for each in others or ())):
        if value is not None and not isinstance(value, nn.Module):
            raise ArgumentError(f"{name} must be torch.nn.Modules, but got {type(value).__name__}")
    rules = chosen(select, ignore)
    arguments = Arguments(loader, optimizer=optimizer, twin=twin, replicas=others, **given)  # pyright: ignore[reportArgumentType]
    with shown():
        return _diagnosed(model, arguments, rules)


def _diagnosed(model: nn.Module, arguments: Arguments, rules: tuple[Rule, ...]) -> Diagnosis:
    case = Case(model, arguments)
    findings, missing = list[Finding](), dict[str, list[str]]()
    may_run = case.runs
    if case.norms and may_run and arguments.loader is not None and not case.record.batches:
        raise InputError("loader must yield at least one batch, but it yields none")
    for rule in rules if case.norms else ():
        lacking = arguments.missing(rule.needs)
        if lacking:
            wanted = " and ".join(f"{need.replace('|', '= or ')}=" for need in lacking)
            missing.setdefault(f"pass {wanted} to ask", []).append(rule.code)
        elif rule.needs and not may_run:
            missing.setdefault(
                "give lazy layers their size by a first input, and layers on the meta device their values, to ask", []
            ).append(rule.code)
        else:
            findings += [finding_of(rule, found) for found in rule.find(case)]
    findings = [priced(case, each) for each in findings]
    findings.sort(key=lambda each: (SEVERITIES.index(each.severity), each.code))
    if isinstance(arguments.loader, Iterator):  # cannot be read again
        arguments = replace(arguments, loader=case.kept)
    measured = case.norms and may_run and arguments.loader is not None
    return Diagnosis(
        tuple(findings),
        layer_rows(case, measured=bool(measured)),
        tuple(f"{what} {', '.join(codes)}" for what, codes in missing.items()),
        case.record.batches if measured else 0,
        arguments,
        lambda again: _diagnosed(again, arguments, rules),
        "" if case.norms else seen_in_place(case),
    )
