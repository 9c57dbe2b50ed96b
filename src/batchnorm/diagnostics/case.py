"""What the rules look at: a model, the arguments of `diagnose`, and measurements, each made when a rule first asks for it.

Every measurement restores the model, so that none depends on another.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from batchnorm.diagnostics import thresholds
from batchnorm.diagnostics.arguments import Arguments, input_in, is_pair, size_of
from batchnorm.diagnostics.by_hand import ByHand, inputs_of, probed
from batchnorm.diagnostics.drawn import are_drawn_at_random
from batchnorm.diagnostics.dropout import Dropout
from batchnorm.diagnostics.gradients import Gradients, gradients_of
from batchnorm.diagnostics.mates import influence_of_mates
from batchnorm.diagnostics.measured import Measured, measured, ratio
from batchnorm.diagnostics.norms import has_values, norms_of
from batchnorm.diagnostics.probes import relative_difference
from batchnorm.diagnostics.progress import counted
from batchnorm.diagnostics.record import Record, in_inference, in_training, record
from batchnorm.diagnostics.state import untouched
from batchnorm.diagnostics.step import Step, copies, counting_steps, differ, watched
from batchnorm.diagnostics.wrappers import let_run_on_cpu, unwrapped
from batchnorm.errors import ArgumentError
from batchnorm.functional.compiled import eager
from batchnorm.population.items import call
from batchnorm.statistics import domain


class Case:
    """A model with everything that can be measured about it.

    Args:
        model: as its user has it, wrapped or not.
        arguments: those of `diagnose`.
        seen: what a training was seen to do, in place of measurements.
    """

    def __init__(self, model: nn.Module, arguments: Arguments, seen: tuple[Record, Step] | None = None) -> None:
        self.model, self.arguments = model, arguments
        self.inside = unwrapped(model)
        self.norms = norms_of(model)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.drops = False  # whether dropout was active in training mode
        self._items = list[tuple[int, Any]]()
        self._with_pools = dict[frozenset[str], Measured]()
        if seen is not None:
            self.__dict__["record"], self.__dict__["stepped"] = seen  # where `cached_property` keeps its values

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
        return self._loss_and_output(item, self.inside)[0]

    def _loss_and_output(self, item: Any, model: nn.Module) -> tuple[Tensor, Any]:
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise ArgumentError(
                "criterion= needs items (input, target) of the loader, but got a "
                f"{type(item).__name__}; pass objective=, a function (model, item) that returns the loss"
            )
        output = self.call(item, model)
        device = next((value.device for value in tree_leaves(output) if isinstance(value, Tensor)), None)
        target = tree_map_only(Tensor, lambda value: value.to(device), item[1])
        assert self.arguments.criterion is not None
        return self.arguments.criterion(output, target), output

    @contextlib.contextmanager
    def untouched(self, *others: nn.Module) -> Iterator[None]:
        """Restore the model, and others, at the end. Layers of torch that refuse the CPU normalize by their own batch meanwhile."""
        with untouched(self.model, *others, optimizer=self.arguments.optimizer), eager():
            let_run_on_cpu((self.model, *others))
            yield

    # ---- passes ------------------------------------------------------------------------------------------------------------------

    @property
    def kept(self) -> list[Any]:
        """The first items of the loader, as many as fit into memory."""
        return [item for _, item in self._items]

    @property
    def items(self) -> list[Any]:
        """The kept items without those that training refuses, and those with NaN or Inf."""
        left_out = self.record.refused | self.record.nonfinite
        return [item for number, item in self._items if number not in left_out]

    def each(self, what: str) -> Iterator[Any]:
        """The kept items, announced."""
        return counted(self.items, what)

    @cached_property
    def record(self) -> Record:
        """One pass in training mode over the first batches of the loader."""
        assert self.arguments.loader is not None
        with self.untouched(), Dropout() as dropout:
            found = record(self.norms, self.inside, counted(self._read(self.arguments.loader), "reading"), self.call)
        self.drops = dropout.active
        return found

    def _read(self, loader: Iterable[Any]) -> Iterator[Any]:
        kept = 0
        for number, item in enumerate(itertools.islice(loader, thresholds.BATCHES)):
            size = size_of(item)
            if not self._items or kept + size <= thresholds.KEPT_BYTES:
                self._items.append((number, item))
                kept += size
            yield item

    @cached_property
    def without_dropout(self) -> tuple[Record, Record] | None:
        """Two passes over the kept items, dropout on and off; None if no dropout is active."""
        whole = self.record
        if not self.drops:
            return None
        on = whole
        if len(self.items) < whole.batches:
            with self.untouched():
                on = record(self.norms, self.inside, self.each("with dropout"), self.call)
        with self.untouched(), Dropout(off=True):
            return on, record(self.norms, self.inside, self.each("without dropout"), self.call)

    @cached_property
    def twin_record(self) -> Record:
        """One pass of the twin in training mode over the kept items."""
        twin = self.arguments.twin
        assert twin is not None
        inside = unwrapped(twin)
        with self.untouched(twin):
            return record(norms_of(twin), inside, self.each("running the twin"), lambda item: self.call(item, inside))

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

    # ---- losses and accuracies ---------------------------------------------------------------------------------------------------

    @property
    def has_loss(self) -> bool:
        """Whether there is a loss, and something to measure it on."""
        return not self.arguments.missing(("loader", "criterion")) and bool(self.items)

    @property
    def can_measure(self) -> bool:
        """Whether there is a loss or an accuracy, and something to measure it on."""
        given = not self.arguments.missing(("loader",)) and not self.arguments.missing(("criterion|predict",))
        return given and self.runs and bool(self.items)

    @property
    def others(self) -> list[nn.Module]:
        """The models that should agree with this one."""
        twin = self.arguments.twin
        return [*([] if twin is None else [twin]), *(self.arguments.replicas or ())]

    def measure(self, model: nn.Module | None = None) -> Measured:
        """Loss and accuracy in inference mode over the kept items: of a model as it is, of the diagnosed one by default."""
        inside = self.inside if model is None else unwrapped(model)
        predict = self.arguments.predict

        def look(item: Any) -> tuple[Tensor | None, Any]:
            loss, output = None, None
            if self.arguments.objective is not None:
                loss = self.arguments.objective(inside, item)
            elif self.arguments.criterion is not None:
                loss, output = self._loss_and_output(item, inside)
            if output is None and predict is not None and is_pair(item):
                output = predict(inside, item[0])
            return loss, output

        with in_inference(inside), torch.no_grad():
            return measured(self.each("measuring"), look)

    def measure_prediction(self) -> Measured:
        """The accuracy of `predict`, in the modes that it finds and sets."""
        predict = self.arguments.predict
        assert predict is not None
        items = (item for item in self.each("predicting") if is_pair(item))
        with torch.no_grad():
            return measured(items, lambda item: (None, predict(self.inside, item[0])))

    @cached_property
    def measured(self) -> Measured:
        """Loss and accuracy of the model in inference."""
        with self.untouched():
            return self.measure()

    @cached_property
    def pools(self) -> Record:
        """One pass over the kept items, in which batch norms train and all else is in inference, as for `recalibrate`."""
        if not self.drops and len(self.items) == self.record.batches:
            return self.record
        with self.untouched(), in_training(self.inside):
            layers = {id(norm.module) for norm in self.norms}
            for module in self.inside.modules():
                module.training &= id(module) in layers
            self.inside.training = True  # each module keeps this mode
            with Dropout(off=True):
                return record(self.norms, self.inside, self.each("pooling"), self.call)

    def give_pools(self, names: Iterable[str]) -> None:
        """Give layers the statistics of the kept items, of any kind that has running statistics."""
        wanted = set(names)
        for name, layer in self.pools.layers.items() if wanted else ():
            for place, part in layer.by_domain().items() if name in wanted else ():
                with contextlib.nullcontext() if place is None else domain(place):
                    if part.pool is not None and part.pool.count > 1:
                        part.norm.set_statistics(part.pool.mean, part.pool.variance(unbiased=True))

    def measured_with_pools(self, names: Iterable[str]) -> Measured:
        """Loss and accuracy if these layers, and no others, have the statistics of the kept items."""
        wanted = frozenset(names)
        if wanted not in self._with_pools:
            pools = self.pools  # outside of `untouched`, which is not to be entered twice
            assert pools is not None
            with self.untouched():
                self.give_pools(wanted)
                self._with_pools[wanted] = self.measure()
        return self._with_pools[wanted]

    def measured_with(self, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> Measured:
        """Loss and accuracy with these means and variances, (C,) each, in place of running statistics."""
        with self.untouched():
            for norm in self.norms:
                if norm.name in statistics:
                    norm.set_statistics(*statistics[norm.name])
            return self.measure()

    @property
    def learning(self) -> list[str]:
        """The layers that `recalibrate` would change."""
        return [name for name, layer in self.record.layers.items() if layer.trained and layer.norm.updates]

    @property
    def loss_ratio(self) -> float | None:
        """Loss by running over loss by recalibrated statistics; None without a loss."""
        if not self.has_loss:
            return None
        return ratio(self.measured, self.measured_with_pools(self.learning))

    @property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The kept items of full size, if all are (tensor, tensor); otherwise none."""
        items = self.items
        if not all(isinstance(item, (tuple, list)) and len(item) == 2 and is_pair(item) for item in items):
            return []
        size = max((len(x) for x, _ in items), default=0)
        return [(x, y) for x, y in items if len(x) == size]

    @cached_property
    def dealt_losses(self) -> tuple[float, float] | None:
        """The loss in training mode of the kept items, and of their samples dealt anew; None if items are not (tensor, tensor)."""
        pairs = self._pairs
        if len(self.items) < 2 or not pairs:
            return None
        size = len(pairs[0][0])
        inputs, targets = (torch.cat([pair[place] for pair in self.items]) for place in (0, 1))
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        dealt = [(inputs[part], targets[part]) for part in order.split(size) if len(part) == size]
        return self._training_loss(pairs), self._training_loss(dealt)

    @cached_property
    def drawn_at_random(self) -> bool:
        """Whether the kept items look like batches of shuffled samples; True if they are not (tensor, tensor)."""
        pairs = self._pairs
        return len(pairs) < 2 or are_drawn_at_random(*zip(*pairs, strict=True))

    def _training_loss(self, items: list[Any]) -> float:
        with self.untouched(), in_training(self.inside), torch.no_grad():
            torch.manual_seed(0)
            losses = [float(self.loss(item)) for item in items]
        return sum(losses) / len(losses)

    @cached_property
    def gradients(self) -> Gradients:
        """One forward and backward in training mode on the first item that has more than one sample per channel."""
        if not self.items:
            return Gradients()
        with self.untouched():
            return gradients_of(self.model, self.inside, self.norms, lambda: self.loss(self.items[0]))

    # ---- the user's code ---------------------------------------------------------------------------------------------------------

    @cached_property
    def mates(self) -> tuple[float, list[str]]:
        """How much the prediction for a sample changes with its batch, relative; and the layers that normalized by the batch."""
        predict = self.arguments.predict
        assert predict is not None
        x = input_in(self.items[0]) if self.items else None
        return (0.0, []) if x is None else influence_of_mates(self.inside, self.norms, predict, x, self.untouched)

    @cached_property
    def validated(self) -> list[str]:
        """Layers whose running statistics changed inside `validate`."""
        validate = self.arguments.validate
        assert validate is not None
        with self.untouched():
            before = {norm.name: copies(norm) for norm in self.norms}
            validate(self.inside)
            return [norm.name for norm in self.norms if differ(before[norm.name], norm.statistics())]

    @cached_property
    def stepped(self) -> Step:
        """What `step` does with the kept items, at most as many as two optimizer steps take."""
        step = self.arguments.step
        assert step is not None
        modes = {norm.name: norm.module.training for norm in self.norms}
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.untouched())
            stack.enter_context(torch.enable_grad())
            found = stack.enter_context(watched(self.inside, self.norms, modes))
            stack.enter_context(counting_steps(self.inside, found))
            for item in self.each("trying step"):
                step(self.inside, item)
                if found.steps >= 2:
                    break
        return found

    # ---- hand-written layers -----------------------------------------------------------------------------------------------------

    @cached_property
    def by_hand(self) -> dict[str, ByHand]:
        """What each hand-written layer does that the first item reaches with more than two samples."""
        layers = [norm for norm in self.norms if norm.kind == "hand-written"]
        if not layers or not self.items:
            return {}
        with self.untouched():
            inputs = inputs_of(layers, self.inside, lambda: self.call(self.items[0]))
        return {
            norm.name: probed(norm, inputs[norm.name], self.untouched)
            for norm in layers
            if norm.name in inputs and len(inputs[norm.name]) > 2
        }
