"""Questions about nodes of torch.fx graphs: what they read, and what they write."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

ADDITIONS = (operator.add, operator.iadd, torch.add)
_METADATA = (
    "size",
    "dim",
    "numel",
    "nelement",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "is_floating_point",
)
_LIKE = (torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like)
_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_AS = ("reshape_as", "view_as", "expand_as", "type_as")
CONSTANT = "constant"  # in a node's meta: a tensor that the traced code created and the module does not own


def in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may write into its first argument."""
    if module is not None:
        return any(bool(getattr(each, "inplace", False)) for each in module.modules())
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    augmented = node.op == "call_function" and name.startswith("i") and hasattr(operator, f"__{name}__")
    named = _named(node)
    asked = bool(named.get("inplace")) or named.get("out") is not None
    return asked or augmented or (name.endswith("_") and not name.endswith("__"))


def _named(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of a function by name, as far as the names are known."""
    if node.op != "call_function":
        return node.kwargs
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):  # builtins have no signature
        return node.kwargs


def uses(user: fx.Node, value: fx.Node) -> int:
    """How often a node uses a value."""
    count = [0]

    def compare(node: fx.Node) -> fx.Node:
        count[0] += node is value
        return node

    fx.map_arg((user.args, user.kwargs), compare)
    return count[0]


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read the values of a node, without those that only ask for its shape or type."""
    return [user for user in node.users if not _reads_metadata(user, node)]


def _reads_metadata(user: fx.Node, node: fx.Node) -> bool:
    if uses(user, node) > 1:
        return False
    if user.op == "call_method":
        return user.target in _METADATA if user.args[0] is node else user.target in _AS
    if user.op == "call_function" and user.target is getattr:
        return user.args[1] in _ATTRIBUTES
    return user.op == "call_function" and user.target in _LIKE
