"""Watches the batch norms of a model while it trains.

Between looks a step is only counted, in a hook of the optimizer. A look takes one step: hooks at the layers record their inputs, and code
that torch.compile compiled runs uncompiled meanwhile, since it ignores hooks. Nothing is compiled again, and no graph breaks.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from statistics import median
from types import TracebackType
from typing import Any, Protocol, Self

import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from batchnorm.diagnostics.arguments import Arguments
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.finding import Finding, finding_of
from batchnorm.diagnostics.formats import named
from batchnorm.diagnostics.norms import norms_of
from batchnorm.diagnostics.record import Record, Recorder
from batchnorm.diagnostics.rule import Rule
from batchnorm.diagnostics.rules import chosen
from batchnorm.diagnostics.rules.running import drifts
from batchnorm.diagnostics.step import Step, holds, watched
from batchnorm.diagnostics.wrappers import unwrapped
from batchnorm.errors import ArgumentError, InputError
from batchnorm.functional.compiled import eager

# What one batch can show. The first need no data; for the others a batch may be an exception, so they have to be seen in a row.
_AT_ONCE = ("BN304", "BN407", "BN504", "BN705")
_IN_A_ROW = ("BN201", "BN404", "BN503", "BN702", "BN704")
_NOT_YET = ("BN202", "BN203")  # what every training has at its beginning
LOOKS = 3  # in a row
WARM = 30  # batches from which running statistics are compared with the data
_MOST_LAYERS = 100  # with scalars of their own


class Writer(Protocol):
    """What takes scalars, such as `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Take a scalar."""


class Monitor:
    """Watches the batch norms of a model while it trains, and warns once about each thing that goes wrong.

        with bn.diagnostics.Monitor(model, every=100):
            for x, y in loader:
                ...
                optimizer.step()

    It counts the steps of optimizers that hold parameters of the model, so that it works in any loop. Every 100th step it looks at one
    batch, and asks rules of `diagnose`: those that need no data, except BN202 and BN203; BN304, BN407, BN504 and BN705; and, since a
    single batch could raise them by chance, BN201, BN404, BN503, BN702 and BN704 only if they hold in three looks in a row. Each rule
    warns once, in the first process. BN201 waits until a layer has had 30 batches.

    The model may be compiled, wrapped by DDP or FSDP, and trained with mixed precision. A look uses its input and changes nothing; after
    the context, also after an exception, no hook is left.

    Args:
        model: as you train it.
        every: steps from one look to the next.
        optimizer: whose steps count, if several optimizers train the model.
        writer: anything with TensorBoard's `add_scalar(tag, value, step)`. It gets the drift, the log ratio of standard deviations and
            the share of dead channels of each layer, as batchnorm/<layer>/drift ..., and the largest and median drift of all. Models of
            more than 100 layers have only the latter.
        select: codes of the rules to ask, or beginnings of codes; None is all.
        ignore: codes not to ask.
        automatic: False if you call `step()` after each optimizer step yourself, as in a compiled `optimizer.step`.

    Attributes:
        findings: what was found so far, a finding for each rule.
        steps: steps counted so far.
        looks: looks taken so far.

    Raises:
        ArgumentError: if an argument is of the wrong kind.
        InputError: if `every` is below 1, or no rule has a code of `select` or `ignore`.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        optimizer: Optimizer | None = None,
        writer: Writer | None = None,
        select: str | Iterable[str] | None = None,
        ignore: str | Iterable[str] | None = None,
        automatic: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise InputError(f"every must be a number of steps, at least 1, but got {every!r}")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise ArgumentError(f"writer must have a method add_scalar, but {type(writer).__name__} has none")
        self._model, self._every, self._optimizer, self._writer = model, every, optimizer, writer
        self._rules = [rule for rule in chosen(select, ignore) if _can_ask(rule, optimizer)]
        self._automatic = automatic
        self.steps = self.looks = 0
        self._found = dict[str, Finding]()
        self._rows = dict[
            str, tuple[int, tuple[str, ...]]
        ]()  # of rules: how often in a row, and the layers in all of these looks
        self._running, self._look = contextlib.ExitStack(), contextlib.ExitStack()
        self._seen: tuple[Recorder, Step] | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found so far, in the order in which it was."""
        return tuple(self._found.values())

    def start(self) -> Self:
        """Begin to count, as `with` does."""
        self._modes = {norm.name: norm.module.training for norm in norms_of(self._model)}
        self._is_ours = weakref.WeakKeyDictionary[Optimizer, bool]()
        if self._automatic:
            self._running.callback(register_optimizer_step_post_hook(self._stepped).remove)
        if self._every == 1:
            self._open()
        return self

    def close(self) -> None:
        """Leave the model without a hook. It can be started again."""
        self._seen = None
        self._look.close()
        self._running.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self) -> None:
        """Count a step; called by itself unless `automatic=False`."""
        self.steps += 1
        if self._seen is not None:
            self._evaluate()
        if (self.steps + 1) % self._every == 0:
            self._open()

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        ours = self._is_ours.get(optimizer)
        if ours is None:
            parameters = {id(value) for value in self._model.parameters()}
            ours = optimizer is self._optimizer if self._optimizer is not None else holds(optimizer, parameters)
            self._is_ours[optimizer] = ours
        if ours:
            self.step()

    def _open(self) -> None:
        """Look at the next step."""
        inside, norms = unwrapped(self._model), norms_of(self._model)
        recorder = Recorder(inside, norms, sources=False)
        self._look.enter_context(eager())
        self._look.enter_context(recorder.hooked())
        self._look.callback(inside.register_forward_pre_hook(_beginning(recorder)).remove)
        self._seen = recorder, self._look.enter_context(watched(inside, norms, self._modes))
        recorder.begin()

    def _evaluate(self) -> None:
        assert self._seen is not None
        (recorder, step), self._seen = self._seen, None
        self._look.close()
        step.steps = 1
        self.looks += 1
        recorder.end()
        record = recorder.finished()
        case = Case(self._model, Arguments(optimizer=self._optimizer), (record, step))
        for rule in self._rules:
            if (
                rule.code == "BN704" and step.forwards != 1
            ):  # one forward of the whole model is what calls are compared in
                continue
            self._ask(rule, case)
        if self._writer is not None:
            for tag, value in _scalars(record).items():
                self._writer.add_scalar(f"batchnorm/{tag}", value, self.steps)

    def _ask(self, rule: Rule, case: Case) -> None:
        found = next(iter(rule.find(case)), None)
        if found is not None and rule.code == "BN201":
            batches = {norm.name: norm.batches for norm in case.norms}
            layers = tuple(name for name in found.layers if (batches[name] or self.steps) >= WARM)
            found = found._replace(layers=layers) if layers else None
        if found is None:
            self._rows.pop(rule.code, None)
            return
        if rule.code in _IN_A_ROW:
            times, before = self._rows.get(rule.code, (0, found.layers))
            layers = tuple(name for name in found.layers if name in before)
            self._rows[rule.code] = (times + 1, layers) if layers else (1, found.layers)
            if self._rows[rule.code][0] < LOOKS:
                return
            found = found._replace(layers=layers)
        finding = finding_of(rule, found)
        is_new = rule.code not in self._found
        self._found[rule.code] = replace(finding, evidence={**finding.evidence, "step": self.steps})
        if is_new and finding.severity != "note" and _is_first_process():
            where = named(finding.layers) or "the training loop"
            text = f"{finding.message}; remedy: {finding.remedy}; {finding.url}"
            warnings.warn(f"{finding.code} at step {self.steps}: {where}: {text}", stacklevel=2)


def _can_ask(rule: Rule, optimizer: Optimizer | None) -> bool:
    known = (not rule.needs and rule.code not in _NOT_YET) or rule.code in (*_AT_ONCE, *_IN_A_ROW)
    return known or (rule.needs == ("optimizer",) and optimizer is not None)


def _beginning(recorder: Recorder) -> Callable[..., None]:
    """A hook that separates the forwards of a step, as with accumulated gradients."""

    def hook(model: nn.Module, _args: Any) -> None:
        if model.training and not recorder.is_empty:
            recorder.end()
            recorder.begin()

    return hook


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _scalars(record: Record) -> Mapping[str, float]:
    """What a writer gets, by tag."""
    drift, found = drifts(record), dict[str, float]()
    if drift:
        nats = [each.nats for each in drift.values()]
        found |= {"drift_max": max(nats), "drift_median": median(nats)}
    if len(record.layers) > _MOST_LAYERS:
        return found
    for name, each in drift.items():
        found[f"{name or 'model'}/drift"] = each.nats
        found[f"{name or 'model'}/log_ratio_of_deviations"] = each.log_ratio
    for name, layer in record.layers.items():
        if layer.pool is not None:
            dead = layer.pool.variance() < (layer.norm.eps or 1e-5)
            found[f"{name or 'model'}/dead_channels"] = float(dead.double().mean())
    return found
