"""Restores everything that running a model can change: values, gradients, modes, attributes, hooks, random numbers, optimizers."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from batchnorm.surgery import walk
from batchnorm.surgery.transaction import Snapshot


class Saved:
    """The complete state of models, to be restored: each tensor is written only if its value changed."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._models = models = list(models)
        _reshard(models)
        self._snapshots = [Snapshot(model) for model in models]
        tensors = dict[int, Tensor]()
        for model in models:
            for value in (*model.parameters(), *model.buffers(), *_plain(model)):
                if not is_lazy(value):
                    tensors[id(value)] = value
        self._values = [(value, value.detach().clone()) for value in tensors.values()]
        self._grads = [(value, value.grad) for value in tensors.values() if value.is_leaf]
        self._grad_values = [(grad, grad.detach().clone()) for _, grad in self._grads if grad is not None]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the models, bit for bit."""
        _reshard(self._models)
        for snapshot in self._snapshots:
            snapshot.restore()
        for value, grad in self._grads:
            if value.grad is not grad:
                value.grad = grad
        for value, before in (*self._values, *self._grad_values):
            if (
                value.layout is not torch.strided
            ):  # sparse gradients cannot be compared, and a detached one is not the same
                value.copy_(before)
            elif not torch.equal(value.detach(), before):
                value.detach().copy_(before)  # `detach` shares the memory, also where a leaf refuses to be written


@contextlib.contextmanager
def untouched(*models: nn.Module, optimizer: Optimizer | None = None) -> Iterator[None]:
    """Restore models, random numbers, and every optimizer that takes a step in this context, also after an exception."""
    saved, random_states = Saved(models), _random_states()
    optimizers = dict[int, tuple[Optimizer, Any]]()

    def remember(stepping: Optimizer, *_: Any) -> None:
        if id(stepping) not in optimizers:
            optimizers[id(stepping)] = (stepping, _state(stepping))

    if optimizer is not None:
        remember(optimizer)
    hook = register_optimizer_step_pre_hook(remember)
    try:
        yield
    finally:
        hook.remove()
        saved.restore()
        for stepping, (state, groups) in optimizers.values():
            stepping.state.clear()
            stepping.state.update(state)
            for group, values in zip(stepping.param_groups, groups, strict=False):
                group.clear()
                group.update(values)
        _restore_random(random_states)


def _reshard(models: Iterable[nn.Module]) -> None:
    """Let fully sharded modules release the parameters that they gathered for a forward: they do not notice that others replace them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in itertools.chain.from_iterable(model.modules() for model in models):
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _state(optimizer: Optimizer) -> Any:
    state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
    return state, [dict(group) for group in optimizer.param_groups]


def _plain(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that are plain attributes of modules, also in lists and dicts, as in hand-written layers."""
    for slot in walk(model):
        for value in vars(slot.module).values():
            if isinstance(value, Tensor):
                yield value
            elif type(value) in (list, tuple):
                yield from (each for each in value if isinstance(each, Tensor))
            elif type(value) is dict:
                yield from (each for each in value.values() if isinstance(each, Tensor))


def _random_states() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (
        random.getstate(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
        None if numpy is None else numpy.random.get_state(),
    )


def _restore_random(states: tuple[Any, ...]) -> None:
    python, torchs, cuda, numpys = states
    random.setstate(python)
    torch.set_rng_state(torchs)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    if numpys is not None:
        sys.modules["numpy"].random.set_state(numpys)
