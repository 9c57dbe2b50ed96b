"""What the rules look at: a model, the arguments of `diagnose`, and measurements, each made when a rule first asks for it.

Every measurement restores the model, so that none depends on another.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from batchnorm.diagnostics import thresholds
from batchnorm.diagnostics.norms import Norm, has_values, norms_of
from batchnorm.diagnostics.probes import among_others, dependence, detachment, relative_difference
from batchnorm.diagnostics.record import Record, in_inference, in_training, input_of, record
from batchnorm.diagnostics.state import untouched
from batchnorm.errors import ArgumentError
from batchnorm.population import recalibrate
from batchnorm.population.items import call
from batchnorm.torch_state import graph_task


@dataclass(frozen=True)
class Arguments:
    """The arguments of `diagnose`, with the same names."""

    loader: Iterable[Any] | None = None
    criterion: Callable[[Any, Any], Tensor] | None = None
    objective: Callable[[nn.Module, Any], Tensor] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    optimizer: Optimizer | None = None
    predict: Callable[[nn.Module, Any], Any] | None = None
    validate: Callable[[nn.Module], Any] | None = None
    step: Callable[[nn.Module, Any], Any] | None = None
    twin: nn.Module | None = None
    replicas: list[nn.Module] | None = None

    def missing(self, needs: Iterable[str]) -> list[str]:
        """Which of `needs` are missing; "a|b" needs one of both, and "criterion" is there if objective is."""
        given = {name for name, value in vars(self).items() if value is not None}
        if "objective" in given:
            given.add("criterion")
        return [need for need in needs if not given & {*need.split("|")}]


@dataclass
class Step:
    """What happened to the layers in calls of `step`.

    Attributes:
        forwards: calls of the model itself.
        steps: steps of optimizers that hold a parameter of the model.
        updates: by layer, calls in a forward that changed running statistics.
        in_backward: by layer, calls within a backward that changed running statistics.
        woken: layers that were handed over in inference mode and ran in training mode.
        moved: layers handed over with a frozen affine whose statistics changed.
    """

    forwards: int = 0
    steps: int = 0
    updates: dict[str, int] = field(default_factory=dict)
    in_backward: dict[str, int] = field(default_factory=dict)
    woken: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)


@dataclass
class Gradients:
    """Gradients of one batch in training mode.

    Attributes:
        parameters: by name.
        outputs: norm of the gradient at the output of each batch norm, in the order of calls.
        in_backward: by layer, calls within the backward that changed running statistics.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    in_backward: dict[str, int] = field(default_factory=dict)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that would exchange buffers or run compiled code, which ignores hooks."""
    while True:
        if isinstance(model, (DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inside := getattr(model, "_orig_mod", None), nn.Module):
            model = inside
        else:
            return model


class _OnCPU(nn.SyncBatchNorm):
    """torch's synchronized layer raises on the CPU."""

    forward = _BatchNorm.forward


class Case:
    """A model with everything that can be measured about it."""

    def __init__(self, model: nn.Module, arguments: Arguments) -> None:
        self.model, self.arguments = model, arguments
        self.inside = unwrapped(model)
        self.norms = norms_of(model)
        self.names = {id(module): name for name, module in model.named_modules()}
        self._items = list[tuple[int, Any]]()

    @cached_property
    def runs(self) -> bool:
        """Whether the model can be run without giving lazy layers a size, and has values."""
        return all(has_values(value) for value in (*self.model.parameters(), *self.model.buffers()))

    # ---- calls -------------------------------------------------------------------------------------------------------------------

    def call(self, item: Any, model: nn.Module | None = None) -> Any:
        """Call the model with an item of the loader."""
        return (self.arguments.forward or call)(self.inside if model is None else model, item)

    def loss(self, item: Any) -> Tensor:
        """The loss of an item: a scalar."""
        if self.arguments.objective is not None:
            return self.arguments.objective(self.inside, item)
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise ArgumentError(
                "criterion= needs items (input, target) of the loader, but got a "
                f"{type(item).__name__}; pass objective=, a function (model, item) that returns the loss"
            )
        output = self.call(item)
        device = next((value.device for value in tree_leaves(output) if isinstance(value, Tensor)), None)
        target = tree_map_only(Tensor, lambda value: value.to(device), item[1])
        assert self.arguments.criterion is not None
        return self.arguments.criterion(output, target)

    @contextlib.contextmanager
    def untouched(self, *others: nn.Module) -> Iterator[None]:
        """Restore the model, and others, at the end. Layers of torch that refuse the CPU normalize by their own batch meanwhile."""
        with untouched(self.model, *others, optimizer=self.arguments.optimizer):
            for module in itertools.chain.from_iterable(model.modules() for model in (self.model, *others)):
                if type(module) is nn.SyncBatchNorm and any(value.device.type == "cpu" for value in module.buffers()):
                    module.__class__ = _OnCPU
            yield

    # ---- passes ------------------------------------------------------------------------------------------------------------------

    @property
    def items(self) -> list[Any]:
        """The first items of the loader, as many as fit into memory, without those that training refuses."""
        refused = self.record.refused
        return [item for number, item in self._items if number not in refused]

    @cached_property
    def record(self) -> Record:
        """One pass in training mode over the first batches of the loader."""
        assert self.arguments.loader is not None
        with self.untouched():
            return record(self.norms, self.inside, self._read(self.arguments.loader), self.call)

    def _read(self, loader: Iterable[Any]) -> Iterator[Any]:
        kept = 0
        for number, item in enumerate(itertools.islice(loader, thresholds.BATCHES)):
            size = sum(value.nbytes for value in tree_leaves(_values(item)) if isinstance(value, Tensor))
            if not self._items or kept + size <= thresholds.KEPT_BYTES:
                self._items.append((number, item))
                kept += size
            yield item

    @cached_property
    def without_dropout(self) -> tuple[Record, Record] | None:
        """Two passes over the kept items, dropout on and off; None if no dropout is active."""
        dropouts = [module for module in self.inside.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
        if not any(module.p > 0 for module in dropouts):
            return None
        with self.untouched():
            on = record(self.norms, self.inside, self.items, self.call)
        with self.untouched():
            for module in dropouts:
                module.p = 0.0
            return on, record(self.norms, self.inside, self.items, self.call)

    @cached_property
    def twin_record(self) -> Record:
        """One pass of the twin in training mode over the kept items."""
        twin = self.arguments.twin
        assert twin is not None
        inside = unwrapped(twin)
        with self.untouched(twin):
            return record(norms_of(twin), inside, self.items, lambda item: self.call(item, inside))

    @cached_property
    def twin_outputs(self) -> float | None:
        """The largest relative difference of outputs in inference mode between model and twin; None if outputs are no tensors."""
        twin = self.arguments.twin
        assert twin is not None
        if not self.items:
            return None
        inside = unwrapped(twin)
        with self.untouched(twin), in_inference(self.inside), in_inference(inside), torch.no_grad():
            mine, others = self.call(self.items[0]), self.call(self.items[0], inside)
        if not isinstance(mine, Tensor) or not isinstance(others, Tensor) or mine.shape != others.shape:
            return None
        return relative_difference(mine, others)

    # ---- losses ------------------------------------------------------------------------------------------------------------------

    def _inference_loss(self) -> float:
        with in_inference(self.inside), torch.no_grad():
            losses = [float(self.loss(item)) for item in self.items]
        return sum(losses) / len(losses)

    @cached_property
    def losses(self) -> tuple[float, float]:
        """The loss in inference by running statistics, and by recalibrated ones, over the kept items."""
        before = self._running_loss
        with self.untouched():
            recalibrate(self.inside, self.items, forward=lambda _, item: self.call(item))
            return before, self._inference_loss()

    @cached_property
    def _running_loss(self) -> float:
        with self.untouched():
            return self._inference_loss()

    @property
    def loss_ratio(self) -> float | None:
        """Loss by running over loss by recalibrated statistics; None without a loss."""
        if self.arguments.missing(("loader", "criterion")) or not self.items:
            return None
        running, recalibrated = self.losses
        return running / recalibrated if recalibrated > 0 else None

    def loss_recalibrated(self, names: Iterable[str]) -> float:
        """The loss in inference if only these layers are recalibrated."""
        wanted = set(names)
        with self.untouched():
            before = {norm.name: norm.statistics() for norm in self.norms}
            before = {
                name: (mean.clone(), var.clone()) for name, pair in before.items() if pair for mean, var in [pair]
            }
            recalibrate(self.inside, self.items, forward=lambda _, item: self.call(item))
            with torch.no_grad():
                for norm in self.norms:
                    if norm.name not in wanted and norm.name in before and norm.kind in ("torch", "ours"):
                        for role, value in zip(("mean", "var"), before[norm.name], strict=True):
                            tensor = norm.tensor(role)
                            assert tensor is not None
                            tensor.copy_(value.view_as(tensor))
            return self._inference_loss()

    @cached_property
    def dealt_losses(self) -> tuple[float, float] | None:
        """The loss in training mode of the kept items, and of their samples dealt anew; None if items are not (tensor, tensor)."""
        items = self.items
        pairs = [item for item in items if isinstance(item, (tuple, list)) and len(item) == 2]
        if len(pairs) < 2 or len(pairs) < len(items) or not all(_is_pair(pair) for pair in pairs):
            return None
        size = max(len(pair[0]) for pair in pairs)
        inputs, targets = (torch.cat([pair[place] for pair in pairs]) for place in (0, 1))
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        dealt = [(inputs[part], targets[part]) for part in order.split(size) if len(part) == size]
        ordered = [pair for pair in pairs if len(pair[0]) == size]
        return self._training_loss(ordered), self._training_loss(dealt)

    def _training_loss(self, items: list[Any]) -> float:
        with self.untouched(), in_training(self.inside), torch.no_grad():
            torch.manual_seed(0)
            losses = [float(self.loss(item)) for item in items]
        return sum(losses) / len(losses)

    @cached_property
    def gradients(self) -> Gradients:
        """One forward and backward in training mode on the first item that has more than one sample per channel."""
        found = Gradients()
        if not self.items:
            return found
        handles = []

        def before(norm: Norm) -> Callable[..., None]:
            def hook(_layer: nn.Module, _args: Any) -> None:
                if graph_task() != -1:
                    values[norm.name] = _copies(norm)

            return hook

        def after(norm: Norm) -> Callable[..., None]:
            def hook(_layer: nn.Module, _args: Any, output: Any) -> None:  # also if a checkpoint stops the call early
                if graph_task() != -1:
                    if _differ(values.get(norm.name), norm.statistics()):
                        found.in_backward[norm.name] = found.in_backward.get(norm.name, 0) + 1
                elif isinstance(output, Tensor) and output.requires_grad:
                    found.outputs.setdefault(norm.name, 0.0)
                    output.register_hook(lambda grad: found.outputs.__setitem__(norm.name, float(grad.norm())))

            return hook

        values = dict[str, Any]()
        with self.untouched(), in_training(self.inside), torch.enable_grad(), contextlib.ExitStack() as stack:
            for value in self.inside.parameters():
                value.grad = None
            for norm in self.norms:
                handles.append(norm.module.register_forward_pre_hook(before(norm)))
                handles.append(norm.module.register_forward_hook(after(norm), always_call=True))
            for handle in handles:
                stack.callback(handle.remove)
            loss = self.loss(self.items[0])
            if loss.requires_grad:
                loss.backward()
                found.parameters = {
                    name: value.grad.clone() for name, value in self.model.named_parameters() if value.grad is not None
                }
        return found

    # ---- the user's code ---------------------------------------------------------------------------------------------------------

    @cached_property
    def mates(self) -> tuple[float, list[str]]:
        """How much the prediction for a sample changes with its batch, relative; and the layers that normalized by the batch."""
        predict = self.arguments.predict
        assert predict is not None
        batch_norms = list[str]()
        if not self.items:
            return 0.0, []

        def before(norm: Norm) -> Callable[..., None]:
            def hook(layer: nn.Module, _args: Any) -> None:
                by_batch = (layer.training and not norm.frozen) or norm.statistics() is None
                if (by_batch or norm.kind == "hand-written") and norm.name not in batch_norms:
                    batch_norms.append(norm.name)

            return hook

        x = _input(self.items[0])
        if x is None or len(x) < 2:
            return 0.0, []
        others = among_others(x)
        outputs = list[Tensor]()
        handles = list[Any]()
        try:
            for norm in self.norms:
                handles.append(norm.module.register_forward_pre_hook(before(norm)))
            for batch in (x, others):
                with self.untouched(), torch.no_grad():
                    torch.manual_seed(0)
                    output = next(
                        (value for value in tree_leaves(predict(self.inside, batch)) if isinstance(value, Tensor)), None
                    )
                if output is None or not output.dim() or len(output) != len(x):
                    return 0.0, []
                outputs.append(output[0].detach().double())
        finally:
            for handle in handles:
                handle.remove()
        return relative_difference(*outputs), batch_norms

    @cached_property
    def validated(self) -> list[str]:
        """Layers whose running statistics changed inside `validate`."""
        validate = self.arguments.validate
        assert validate is not None
        with self.untouched():
            before = {norm.name: _copies(norm) for norm in self.norms}
            validate(self.inside)
            return [norm.name for norm in self.norms if _differ(before[norm.name], norm.statistics())]

    @cached_property
    def stepped(self) -> Step:
        """What `step` does with the kept items, at most as many as two optimizer steps take."""
        step, found, values = self.arguments.step, Step(), dict[str, Any]()
        assert step is not None
        handed_over = {norm.name: norm.module.training for norm in self.norms}
        stopped = [norm for norm in self.norms if norm.updates and is_stopped(norm)]
        parameters = {id(value) for value in self.model.parameters()}

        def before(norm: Norm) -> Callable[..., None]:
            def hook(layer: nn.Module, _args: Any) -> None:
                values[norm.name] = _copies(norm)
                woken = layer.training and not norm.frozen and not handed_over[norm.name]
                if woken and norm.name not in found.woken:
                    found.woken.append(norm.name)

            return hook

        def after(norm: Norm) -> Callable[..., None]:
            def hook(_layer: nn.Module, _args: Any, _output: Any) -> None:
                if _differ(values.get(norm.name), norm.statistics()):
                    counts = found.updates if graph_task() == -1 else found.in_backward
                    counts[norm.name] = counts.get(norm.name, 0) + 1
                    if norm in stopped and norm.name not in found.moved:
                        found.moved.append(norm.name)

            return hook

        def stepping(optimizer: Optimizer, *_: Any) -> None:
            if any(id(value) in parameters for group in optimizer.param_groups for value in group["params"]):
                found.steps += 1

        with self.untouched(), torch.enable_grad(), contextlib.ExitStack() as stack:
            stack.callback(register_optimizer_step_post_hook(stepping).remove)
            stack.callback(self.inside.register_forward_hook(lambda *_: _add_forward(found)).remove)
            for norm in self.norms:
                stack.callback(norm.module.register_forward_pre_hook(before(norm)).remove)
                stack.callback(norm.module.register_forward_hook(after(norm), always_call=True).remove)
            for item in self.items:
                step(self.inside, item)
                if found.steps >= 2:
                    break
        return found

    # ---- hand-written layers -----------------------------------------------------------------------------------------------------

    @cached_property
    def by_hand(self) -> dict[str, tuple[float, float]]:
        """By hand-written layer: how much inference depends on the batch, relative, and |sum of dx| over sum of |dx| in training."""
        inputs, found = dict[str, Tensor](), dict[str, tuple[float, float]]()
        layers = [norm for norm in self.norms if norm.kind == "hand-written"]
        if not layers or not self.items:
            return found
        with self.untouched(), torch.no_grad(), contextlib.ExitStack() as stack:
            for norm in layers:

                def keep(_layer: nn.Module, args: Any, kwargs: Any, norm: Norm = norm) -> None:
                    if input_of(norm, args, kwargs) is not None:
                        inputs.setdefault(norm.name, args[0].detach().clone())

                stack.callback(norm.module.register_forward_pre_hook(keep, with_kwargs=True).remove)
            with in_training(self.inside):
                self.call(self.items[0])
        for norm in layers:
            x = inputs.get(norm.name)
            if x is not None and len(x) > 2:
                with self.untouched():
                    found[norm.name] = dependence(norm, x), detachment(norm, x)
        return found


def is_stopped(norm: Norm) -> bool:
    """Whether a layer has an affine that does not learn."""
    own = list(norm.module.parameters(recurse=False))
    return bool(own) and not any(value.requires_grad for value in own)


def _copies(norm: Norm) -> tuple[Tensor, Tensor] | None:
    pair = norm.statistics()
    return None if pair is None else (pair[0].clone(), pair[1].clone())


def _differ(before: tuple[Tensor, Tensor] | None, after: tuple[Tensor, Tensor] | None) -> bool:
    """Whether values changed, except NaN that stayed NaN; torch's kernels do not raise the version of a buffer."""
    if before is None or after is None:
        return False
    return any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


def _add_forward(found: Step) -> None:
    found.forwards += 1


def _is_pair(item: Any) -> bool:
    return all(isinstance(value, Tensor) and value.dim() for value in item) and len(item[0]) == len(item[1])


def _input(item: Any) -> Tensor | None:
    given = item[0] if isinstance(item, (tuple, list)) and item else item
    return given.clone() if isinstance(given, Tensor) and given.dim() else None


def _values(item: Any) -> Any:
    return list(item.values()) if hasattr(item, "values") and not isinstance(item, Tensor) else item
