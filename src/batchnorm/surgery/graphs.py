"""What a node of a torch.fx graph does to its arguments."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

ADDITIONS = (operator.add, operator.iadd, torch.add)


def in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may write into its first argument."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    augmented = node.op == "call_function" and name.startswith("i") and hasattr(operator, f"__{name}__")
    return bool(node.kwargs.get("inplace")) or augmented or (name.endswith("_") and not name.endswith("__"))


def uses(user: fx.Node, value: fx.Node) -> int:
    """How often a node uses a value."""
    count = [0]

    def seen(node: fx.Node) -> fx.Node:
        count[0] += node is value
        return node

    fx.map_arg((user.args, user.kwargs), seen)
    return count[0]
