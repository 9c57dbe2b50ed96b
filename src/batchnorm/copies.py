"""Copies of a model that learns, such as averages of its weights and target networks, with statistics that fit their own weights.

A copy gets weights, not batches, so nothing updates its running statistics. `track` watches both models. It notices that the weights of
the copy changed before the next training step of the model and before the next inference of the copy, whoever changed them, and then does
what its method says. No update function is wrapped, so it works with every recipe.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.population import recalibrate_alone
from batchnorm.surgery import batch_norms, copy_statistics
from batchnorm.surgery.averages import pairs_of, without_wrappers
from batchnorm.torch_state import norms

METHODS = ("recalibrate", "copy", "average")
_INSIDE = ("module", "ema_model")  # where wrappers have the copy: AveragedModel and timm, ema-pytorch


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def track(
    model: nn.Module,
    copy: nn.Module,
    *,
    method: str = "recalibrate",
    decay: float | None = None,
    batches: int = 16,
    every: int = 1,
) -> Tracker:
    """Keep the running statistics of a copy of a model right while the copy's weights follow those of the model.

    The copy is an average of weights (`torch.optim.swa_utils.AveragedModel`, timm's `ModelEmaV3`, ema-pytorch's `EMA`, a module that your
    own loop averages) or a target network. Call it as you call the copy today; nothing else changes in the loop.

    - "recalibrate": before an inference of the copy, if its weights changed, it gets the pooled moments of its own activations on the
      last batches that the model was trained on. So its statistics are those of its weights, after any number of steps.
    - "copy": with each change of its weights, it gets the running statistics of the model. Exact where the weights are copies too, as in
      a target network that is replaced from time to time.
    - "average": with each change, its statistics move as weights do, by `decay`; counters are copied. For soft target networks (Polyak
      averages), whose weights are close to the model's.

    Statistics that the wrapper itself wrote (`use_buffers=True`, timm's) are replaced. Layers are matched by name, as in
    `copy_statistics`, so either model may be converted, before or after the other was made.

    Args:
        model: the model that learns, or its DDP wrapper: what the loop calls.
        copy: the copy, or its wrapper.
        method: "recalibrate", "copy" or "average".
        decay: for "average": the weight of the old value, as in the average of the weights.
        batches: for "recalibrate": how many of the model's last training batches to keep a reference to.
        every: for "recalibrate": after how many changes of the weights the statistics count as old.

    Returns:
        The tracker. `stop()` ends it; without a reference to it, tracking goes on as long as the models live.

    Raises:
        ArgumentError: if model or copy is not a module.
        InputError: on an unknown method, a decay outside of [0, 1] or missing for "average", or batches or every below 1.
        StateError: if the copy is the model, or a batch norm of the copy has no counterpart of its size in the model.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, but got {method!r}")
    if method == "average" and decay is None:
        raise InputError('method="average" needs decay, the weight of the old value; pass that of the weights')
    if decay is not None and not 0 <= decay <= 1:
        raise InputError(f"decay must be between 0 and 1, but got {decay!r}")
    for name, number in (("batches", batches), ("every", every)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise InputError(f"{name} must be an integer of at least 1, but got {number!r}")
    return Tracker(model, _inside(model, copy), method, decay, batches, every)


class Tracker:
    """What `track` returns: the connection between a model and its copy.

    Attributes:
        model: the model that learns.
        copy: the copy itself, without its wrapper.
    """

    def __init__(
        self, model: nn.Module, copy: nn.Module, method: str, decay: float | None, batches: int, every: int
    ) -> None:
        self.model, self.copy = model, copy
        self._method, self._decay, self._every = method, decay, every
        self._calls = deque[_Call](maxlen=batches)
        self._changes = 0  # of the copy's weights since its statistics were renewed
        self._busy = False
        self._seen = self._weights()
        self._own = [to.clone() for to, _ in pairs_of(model, copy)]  # raises if the models do not fit
        self._hooks = [
            model.register_forward_pre_hook(_BeforeCall(self, "_before_model"), with_kwargs=True),
            copy.register_forward_pre_hook(_BeforeCall(self, "_before_copy"), with_kwargs=True),
        ]

    def refresh(self) -> None:
        """Make the statistics of the copy right now, whatever `every` says: before you save it, for example."""
        self._notice()
        if self._changes:
            self._renew()

    def polyak(self, tau: float | None = None) -> None:
        """Move the weights of the copy toward those of the model by `tau`, and its statistics as `track`'s method says.

            copy = (1 - tau) · copy + tau · model

        Args:
            tau: between 0 and 1, which copies; None is 1 - decay. With "average" the statistics move by the same tau.

        Raises:
            InputError: if tau is outside of [0, 1], or missing where there is no decay.
            StateError: if a parameter of the copy has no counterpart of its shape in the model.
        """
        if tau is None:
            if self._decay is None:
                raise InputError("polyak needs tau, the weight of the model, where track has no decay; pass it")
            tau = 1 - self._decay
        if not 0 <= tau <= 1:
            raise InputError(f"tau must be between 0 and 1, but got {tau!r}")
        self._notice()
        others = {without_wrappers(name): value for name, value in self.model.named_parameters()}
        with torch.no_grad():
            for name, value in self.copy.named_parameters():
                of = others.get(without_wrappers(name))
                if of is None or of.shape != value.shape:
                    raise StateError(
                        f"every parameter of the copy must have one of its shape in the model, but {name} has none"
                    )
                value.lerp_(of.to(value.device, value.dtype), tau)
        self._seen = self._weights()
        self._changed(tau)

    def stop(self) -> None:
        """Stop tracking: the copy keeps its statistics, and the kept batches are released."""
        for hook in self._hooks:
            hook.remove()
        self._calls.clear()

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self.model or not module.training:
            return
        self._notice()  # the statistics of the model are still those of its last step
        if self._method == "recalibrate":
            self._calls.append(_Call(*tree_map_only(Tensor, Tensor.detach, (args, kwargs))))

    def _before_copy(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002 (torch's)
        if module is not self.copy or self._busy:
            return
        self._notice()
        if self._changes >= self._every and not module.training:
            self._renew()

    def _notice(self) -> None:
        """See whether somebody changed the weights of the copy."""
        weights = self._weights()
        if weights.same_as(self._seen):
            return
        self._seen = weights
        self._changed(None if self._decay is None else 1 - self._decay)

    @torch.no_grad()
    def _changed(self, tau: float | None) -> None:
        """The weights of the copy moved, by `tau` toward the model's if that is known."""
        self._changes += 1
        if self._method == "copy" or (self._method == "average" and tau == 1):
            copy_statistics(self.model, self.copy)
            self._changes = 0
        elif self._method == "average":
            assert tau is not None
            for i, (to, of) in enumerate(pairs_of(self.model, self.copy)):
                before, now = self._own[i], of.to(to.device, to.dtype)
                to.copy_(before.lerp(now, tau) if to.is_floating_point() or to.is_complex() else now)
            self._changes = 0
        if not self._changes:
            self._own = [to.clone() for to, _ in pairs_of(self.model, self.copy)]

    def _renew(self) -> None:
        """Give the copy the statistics of its own activations; before the first batch, those of the model."""
        self._busy = True
        try:
            if self._calls:
                with torch.inference_mode(False):
                    recalibrate_alone(self.copy, [*self._calls], _call)
            else:
                copy_statistics(self.model, self.copy)
        finally:
            self._busy = False
        self._changes = 0

    def _weights(self) -> _Weights:
        return _Weights.of(self.copy)


class _Weights:
    """What tells whether weights changed: versions, which writing through `.data` does not raise, and norms."""

    def __init__(self, versions: list[int], norms: Tensor | None) -> None:
        self.versions, self.norms = versions, norms

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        values = [value.detach() for value in module.parameters()]
        each = norms(values) if values else None
        together = None if each is None else torch.stack([norm.to(each[0].device, torch.float64) for norm in each])
        return cls([value._version for value in values], together)

    def same_as(self, other: _Weights) -> bool:
        if self.versions != other.versions:
            return False
        return self.norms is None or other.norms is None or torch.equal(self.norms, other.norms)


class _BeforeCall:
    """A hook that a copied or unpickled module has without effect: it would watch models that it does not belong to."""

    def __init__(self, tracker: Tracker | None, name: str) -> None:
        self.tracker, self.name = tracker, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.tracker is not None:
            getattr(self.tracker, self.name)(module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _BeforeCall, (None, self.name)


def _call(model: nn.Module, item: _Call) -> Any:
    device = next((value.device for value in (*model.parameters(), *model.buffers())), None)
    args, kwargs = (
        item if device is None else tree_map_only(Tensor, lambda value: value.to(device), (item.args, item.kwargs))
    )
    return model(*args, **kwargs)


def _inside(model: nn.Module, copy: nn.Module) -> nn.Module:
    """The copy itself: the first module under the wrapper that has the batch norms of the model."""
    if not isinstance(copy, nn.Module):
        raise ArgumentError(
            f"copy must be a torch.nn.Module, but got {type(copy).__name__}; pass the module that averages weights"
        )
    if copy is model:
        raise StateError("the copy must be a module of its own, but it is the model; pass copy.deepcopy(model)")
    wanted = {without_wrappers(name) for name in batch_norms(model)}
    candidates = [copy, *(found for name in _INSIDE if isinstance(found := getattr(copy, name, None), nn.Module))]
    fitting = [each for each in candidates if {without_wrappers(name) for name in batch_norms(each)} == wanted]
    return fitting[-1] if fitting else candidates[-1]
