"""Test-time adaptation: the batch norms of a trained model fit themselves to a stream of unlabeled data.

- statistics: each batch is normalized by its own statistics (Schneider et al. 2020, arXiv:2006.16971; Nado et al. 2020, arXiv:2006.10963).
- mixed: by its own and the running statistics, mixed (Schneider et al., equation 1).
- tent: by its own, and weight and bias of the batch norms descend the entropy of the predictions (Wang et al. 2021, arXiv:2006.10726).
- sar: as tent, but on samples of low entropy only, toward a flat minimum, and with a way back (Niu et al. 2023, arXiv:2302.12400).

All of them need batches that look like the data as a whole. In a batch of one class, what the classes have in common is what tells them
from others, and normalization subtracts it (Gong et al. 2022, arXiv:2208.05117; Yuan et al. 2023, arXiv:2303.13899). The guard compares
the entropy of the predictions with that of the model as it was trained, and stays with the latter where the adapted one is unsure and the
trained one is surer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.layers import BatchNorm
from batchnorm.statistics import Mixed
from batchnorm.statistics.contract import infers_by_running_statistics, is_frozen
from batchnorm.surgery import batch_norms
from batchnorm.surgery.exchange import convert_layers
from batchnorm.surgery.report import Report
from batchnorm.surgery.walker import slots_of

METHODS = ("statistics", "mixed", "tent", "sar")
_LEARNING = ("tent", "sar")
_RELIABLE = 0.4  # of ln C: samples of higher entropy do not count in sar (Niu et al., section 4.1)
_UNSURE = 0.1  # of ln C: below this mean entropy the guard trusts the adapted model; on digits, batches of one class have 0.28 or more
_RADIUS = 0.05  # of sar's step to the sharpest point near the weights (section 4.2)
_COLLAPSED = 0.2 / math.log(
    1000
)  # of ln C: a moving average of the entropy below it restores the model (0.2 on ImageNet)
_REMEMBERED = 0.9  # of that moving average

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adapt(
    model: nn.Module,
    method: str = "statistics",
    *,
    prior: float | None = None,
    guard: bool = True,
    smallest: int = 16,
    optimizer: MakeOptimizer | None = None,
    logits: Callable[[Any], Tensor] | None = None,
) -> Adapted:
    """A copy of a trained model whose batch norms adapt to the batches that it is called with. Your model does not change.

        adapted = bn.adapt(model, "tent")
        for images in stream:
            predictions = adapted(images).argmax(1)

    Args:
        model: trained, with running statistics; torch's layers or ours. Frozen layers stay as they are.
        method: "statistics", "mixed", "tent" or "sar" (see the module).
        prior: how many samples the running statistics count for, in the mixture with those of the batch; None is 16 for "mixed" and 0 for
            the others.
        guard: call the model as it was trained too, and return its outputs, without a step, where the adapted model is unsure (mean
            entropy above 0.1 ln C) and the trained one is not less sure. It costs a forward, and protects from batches of one class.
        smallest: batches of fewer samples are normalized by the running statistics, and nothing is learned from them.
        optimizer: makes the optimizer of the weights and biases; None is Adam at 1e-3 for "tent" and SGD at 2.5e-4 with momentum 0.9 for
            "sar", as in the papers.
        logits: takes the logits (N, C, *S), C at least 2, from the model's output; None where the output is the logits. Without a guard,
            "statistics" and "mixed" take any output.

    Raises:
        ArgumentError: if model is not a module.
        InputError: on an unknown method, a prior below 0, or smallest below 1.
        StateError: if the model has no batch norm that can adapt.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, but got {method!r}")
    source = Mixed((16.0 if method == "mixed" else 0.0) if prior is None else prior, smallest)
    return Adapted(model, method, source, guard=guard, optimizer=optimizer, logits=logits)


class Adapted(nn.Module):
    """What `adapt` returns: call it as you call the model, batch by batch. It is in inference mode, and stays there.

    Attributes:
        model: the copy of the model that adapts.
        guarded: how many batches the model as it was trained has answered, because it was surer.
        recovered: how many times weights and biases went back to those of training, because the predictions had collapsed.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        source: Mixed,
        *,
        guard: bool,
        optimizer: MakeOptimizer | None,
        logits: Callable[[Any], Tensor] | None,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        converted = convert_layers(slots_of(self.model), Report("adapt", "converted"))
        self._method, self._source, self._guard, self._logits = method, source, guard, logits
        self._layers = list[BatchNorm]()
        report = Report("adapt", "adapt", left=converted.left, total=converted.total)
        for name, layer in batch_norms(self.model).items():
            if isinstance(layer, BatchNorm) and _adapts(layer):
                self._layers.append(layer)
                report.changed.append(name)
            elif name not in report.left:
                report.leave(name, "it is frozen, or has no running statistics of its own")
        report.log()
        if not self._layers:
            raise StateError(
                "adapting needs batch norms with running statistics that are not frozen, but the model has none"
            )
        self._before = [layer.statistics for layer in self._layers]
        own = {id(value) for layer in self._layers for value in layer.parameters(recurse=False)}
        self._learned = {name: value for name, value in self.model.named_parameters() if id(value) in own}
        for value in self._learned.values():
            value.requires_grad_(method in _LEARNING)
        self._trained = {name: value.detach().clone() for name, value in self._learned.items()}
        self._make = optimizer or _OPTIMIZERS.get(method)
        self.reset()

    def reset(self) -> None:
        """Begin a new stream: weights, biases and the optimizer as after training, and the counters 0."""
        self._restore()
        self.guarded = self.recovered = 0

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 (torch's)
        """Stay in inference mode."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for a batch, before the batch's step if there is one. The first tensor among the arguments is (N, ...)."""
        with torch.inference_mode(False):
            args, kwargs = tree_map_only(Tensor, _ordinary, (args, kwargs))
            call = partial(self.model, *args, **kwargs)
            learns = self._method in _LEARNING and _samples(args, kwargs) >= self._source.smallest
            with torch.set_grad_enabled(learns), self._by(self._source):
                outputs = call()
            if not (self._guard or self._method in _LEARNING):
                return outputs
            found = _Predictions.of(self._take(outputs))
            if self._guard or not found.are_finite():
                with torch.no_grad():
                    trained = torch.func.functional_call(self.model, self._trained, args, kwargs)
                if not found.are_finite():
                    self._recover()
                    return trained
                unsure = found.entropy() > _UNSURE * found.largest
                if unsure and _Predictions.of(self._take(trained)).entropy() <= found.entropy():
                    self.guarded += 1
                    return trained
            if learns:
                self._learn(found, call)
            return tree_map_only(Tensor, Tensor.detach, outputs)

    def _learn(self, found: _Predictions, call: Callable[[], Any]) -> None:
        """One step of weights and biases; back to those of training if the predictions have collapsed."""
        assert self._optimizer is not None
        if self._method == "tent":
            loss, seen = found.entropies.mean(), found.marginal
            _set_gradients(loss, self._learned)
        else:
            seen = self._set_sharpness_aware_gradients(found, call)
        if seen is None:
            return
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._average = seen if self._average is None else _REMEMBERED * self._average + (1 - _REMEMBERED) * seen
        if self._average < _COLLAPSED * found.largest:
            self._recover()

    def _set_sharpness_aware_gradients(self, found: _Predictions, call: Callable[[], Any]) -> float | None:
        """The gradients of the reliable samples' entropy, where it is sharpest near the weights; its value, or None if there are none.

        That point is the weights plus `_RADIUS` along the gradient, which has norm 1 (Foret et al. 2021, arXiv:2010.01412).
        """
        reliable = found.entropies < _RELIABLE * found.largest
        if not reliable.any():
            return None
        _set_gradients(found.entropies[reliable].mean(), self._learned)
        with torch.no_grad():
            slopes = {name: value.grad for name, value in self._learned.items() if value.grad is not None}
            length = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(slope) for slope in slopes.values()])
            )
            steps = {name: slope * (_RADIUS / (length + 1e-12)) for name, slope in slopes.items()}
            for name, step in steps.items():
                self._learned[name].add_(step)
        with self._by(self._source):
            there = _Predictions.of(self._take(call())).entropies[reliable]
        there = there[there < _RELIABLE * found.largest]
        if len(there):
            _set_gradients(there.mean(), self._learned)
        with torch.no_grad():
            for name, step in steps.items():
                self._learned[name].sub_(step)
        if not len(there):
            return None
        return there.mean().item()

    def _recover(self) -> None:
        self._restore()
        self.recovered += 1

    def _restore(self) -> None:
        """Weights, biases and the optimizer as after training."""
        self._average: float | None = None
        with torch.no_grad():
            for name, value in self._learned.items():
                value.copy_(self._trained[name])
        self._optimizer: torch.optim.Optimizer | None = None
        if self._method in _LEARNING:
            assert self._make is not None
            self._optimizer = self._make(self._learned.values())

    @contextmanager
    def _by(self, source: Mixed) -> Iterator[None]:
        """Normalize by a source in this context."""
        for layer in self._layers:
            layer.statistics = source
        try:
            yield
        finally:
            for layer, before in zip(self._layers, self._before, strict=True):
                layer.statistics = before

    def _take(self, outputs: Any) -> Tensor:
        found = outputs if self._logits is None else self._logits(outputs)
        if not isinstance(found, Tensor) or found.dim() < 2 or found.shape[1] < 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ArgumentError(
                f"the entropy needs logits (N, C, *S) of at least two classes, but got {shape}; pass logits=, a function that takes them "
                "from the model's output"
            )
        return found


class _Predictions(NamedTuple):
    """What logits predict.

    Attributes:
        entropies: of each prediction, (N · S,).
        marginal: the entropy of the mean prediction: near 0 if all predictions are one class.
        largest: ln C.
    """

    entropies: Tensor
    marginal: float
    largest: float

    @staticmethod
    def of(logits: Tensor) -> _Predictions:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logarithms = wide.movedim(1, -1).flatten(0, -2).log_softmax(1)  # (N · S, C)
        mean = logarithms.detach().exp().mean(0)
        return _Predictions(
            -(logarithms.exp() * logarithms).sum(1), torch.special.entr(mean).sum().item(), math.log(logits.shape[1])
        )

    def are_finite(self) -> bool:
        return bool(self.entropies.isfinite().all())

    def entropy(self) -> float:
        return self.entropies.mean().item()


_OPTIMIZERS: dict[str, MakeOptimizer] = {
    "tent": partial(torch.optim.Adam, lr=1e-3),
    "sar": partial(torch.optim.SGD, lr=2.5e-4, momentum=0.9),
}


def _adapts(layer: BatchNorm) -> bool:
    return layer.running_mean is not None and not is_frozen(layer) and infers_by_running_statistics(layer)


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """N of the first tensor that is no number."""
    return next(
        (value.shape[0] for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.dim()), 0
    )


def _ordinary(value: Tensor) -> Tensor:
    """A tensor that autograd can save."""
    return value.clone() if value.is_inference() else value


def _set_gradients(loss: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    """Set the gradients of these parameters alone."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for value, grad in zip(parameters.values(), found, strict=True):
        value.grad = grad
