"""Transactions: a model is changed completely or not at all.

A snapshot stores what surgery can change: each module's class, attributes and contents of containers (parameters, buffers, submodules,
hooks), and whether each tensor requires a gradient. It copies references, not values, so it is cheap; values of buffers are copied only on
request.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.errors import ArgumentError
from batchnorm.surgery.walker import walk

_CONTAINERS = (dict, OrderedDict, set, list)
_P = ParamSpec("_P")
_R = TypeVar("_R")
_M = TypeVar("_M")


class Snapshot:
    """The state of a model, to be restored later.

    Args:
        model: with all its submodules.
        values: whether to copy the values of its buffers too.
    """

    def __init__(self, model: nn.Module, *, values: bool = False) -> None:
        modules = list({id(slot.module): slot.module for slot in walk(model)}.values())
        self._modules = [(module, type(module), dict(vars(module))) for module in modules]
        self._containers = [
            (container, type(container)(container))
            for _, _, attributes in self._modules
            for container in attributes.values()
            if type(container) in _CONTAINERS
        ]
        tensors = {id(value): value for value in (*model.parameters(), *model.buffers())}.values()
        self._requires_grad = [(value, value.requires_grad) for value in tensors]
        self._values = [(value, value.detach().clone()) for value in model.buffers() if values and not is_lazy(value)]

    def restore(self) -> None:
        """Restore the model, object by object."""
        for module, cls, attributes in self._modules:
            if type(module) is not cls:
                module.__class__ = cls
            _refill(vars(module), attributes)
        for container, contents in self._containers:
            _refill(container, contents)
        for value, required in self._requires_grad:
            if value.requires_grad != required:
                value.requires_grad = required  # not requires_grad_(), which lazy parameters refuse
        with torch.no_grad():
            for value, before in self._values:
                value.copy_(before)


def _refill(container: Any, contents: Any) -> None:
    """Restore the contents and the order of a container, if they changed."""
    if isinstance(container, dict):
        same = len(container) == len(contents) and all(
            key == other and value is was
            for (key, value), (other, was) in zip(container.items(), contents.items(), strict=True)
        )
        if not same:
            container.clear()
            container.update(contents)
    elif isinstance(container, set):
        if container != contents:
            container.clear()
            container.update(contents)
    elif len(container) != len(contents) or any(a is not b for a, b in zip(container, contents, strict=True)):
        container[:] = contents


@contextlib.contextmanager
def transaction(model: nn.Module, *, values: bool = False) -> Iterator[None]:
    """Restore the model if the context raises.

    With `values`, restore the values of buffers too; code that writes into them needs it.
    """
    before = Snapshot(model, values=values)
    try:
        yield
    except BaseException:
        before.restore()
        raise


def transactional(
    *, values: bool = False
) -> Callable[[Callable[Concatenate[_M, _P], _R]], Callable[Concatenate[_M, _P], _R]]:
    """Decorate a function whose first argument is the model: its body becomes a `transaction`."""

    def decorate(function: Callable[Concatenate[_M, _P], _R]) -> Callable[Concatenate[_M, _P], _R]:
        @functools.wraps(function)
        def changing(model: _M, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not isinstance(model, nn.Module):
                raise ArgumentError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
            with transaction(model, values=values):
                return function(model, *args, **kwargs)

        return changing

    return decorate
