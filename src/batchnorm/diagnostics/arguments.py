"""The arguments of `diagnose`, and the items of its loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_leaves


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


def is_pair(item: Any) -> bool:
    """Whether an item is an input and a target with a row for each sample."""
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        return False
    return all(isinstance(value, Tensor) and value.dim() for value in item) and len(item[0]) == len(item[1])


def input_in(item: Any) -> Tensor | None:
    """A copy of the input in an item; None if it is no tensor."""
    given = item[0] if isinstance(item, (tuple, list)) and item else item
    return given.clone() if isinstance(given, Tensor) and given.dim() else None


def size_of(item: Any) -> int:
    """The bytes of the tensors in an item."""
    values = list(item.values()) if hasattr(item, "values") and not isinstance(item, Tensor) else item
    return sum(value.nbytes for value in tree_leaves(values) if isinstance(value, Tensor))
