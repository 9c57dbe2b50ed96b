"""Functions that commute with an affine function of the channels, and where they move the channel axis."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from batchnorm.surgery.graphs import ADDITIONS, CONSTANT

SUBTRACTIONS = (operator.sub, operator.isub, torch.sub)
CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


def _ranks(*names: str) -> dict[type[nn.Module], int]:
    """Torch's classes with these names, and the number of their spatial axes."""
    return {getattr(nn, f"{name}{rank}d"): rank for name in names for rank in (1, 2, 3)}


_AVERAGES = _ranks("AvgPool")
_MAXIMA = _ranks("MaxPool", "AdaptiveMaxPool")
CONSTANT_PADS = _ranks("ZeroPad", "ConstantPad")
# each output is a weighted mean of inputs of the same channel
_COMMUTING = _ranks("AdaptiveAvgPool", "ReflectionPad", "ReplicationPad", "CircularPad")
_POOLS = _AVERAGES | _MAXIMA | _COMMUTING
_RESIZING = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)


def _functions(name: str) -> dict[Any, int]:
    """The functions with this name, and the number of their spatial axes."""
    modules: tuple[Any, ...] = (F, torch)
    return {
        found: rank
        for rank in (1, 2, 3)
        for module in modules
        if (found := getattr(module, f"{name}{rank}d", None)) is not None
    }


_AVERAGE_FUNCTIONS = _functions("avg_pool")
_MAXIMUM_FUNCTIONS = _functions("max_pool") | _functions("adaptive_max_pool")
_COMMUTING_FUNCTIONS = _functions("adaptive_avg_pool")
_AVERAGE_OPTIONS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_COMMUTING_MODES = ("reflect", "replicate", "circular")


class Refused(Exception):  # noqa: N818 (not an error: the reason why a batch norm is not folded)
    """The reason why a batch norm cannot be folded."""


def is_identity(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node returns its first argument in inference."""
    if module is not None:
        return type(module) in _IDENTITIES
    if node.target in _DROPOUTS:
        return node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True) is False
    return node.op == "call_method" and node.target == "contiguous"


def averages(node: fx.Node, module: Any, axis: int, *, positive: bool) -> bool:
    """Whether f(scale · x + shift) = scale · f(x) + shift, with the same channel axis before and after.

    `positive` says whether all scales are positive; then it holds for maxima too.
    """
    beside = len(shape_of(node) or ()) - axis - 1  # the number of axes after the channel axis
    if node.op == "call_function":
        return _function_averages(node, beside, positive=positive)
    if type(module) in _RESIZING:  # all its modes weight inputs of one channel with numbers that sum to 1
        return axis == 1
    if type(module) not in _POOLS or beside != _POOLS[type(module)]:
        return False
    if type(module) in _MAXIMA:
        return positive and not module.return_indices
    if type(module) in _AVERAGES:
        return _is_mean({name: getattr(module, name, None) for name in _AVERAGE_OPTIONS})
    return type(module) in _COMMUTING


def _function_averages(node: fx.Node, beside: int, *, positive: bool) -> bool:
    function: Any = node.target
    if function in _AVERAGE_FUNCTIONS:
        given = dict(zip(_AVERAGE_OPTIONS, node.args[1:], strict=False)) | dict(node.kwargs)
        defaults = {"padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
        return beside == _AVERAGE_FUNCTIONS[function] and _is_mean({**defaults, **given})
    if function in _MAXIMUM_FUNCTIONS:
        return positive and beside == _MAXIMUM_FUNCTIONS[function] and not node.kwargs.get("return_indices", False)
    if function in _COMMUTING_FUNCTIONS:
        return beside == _COMMUTING_FUNCTIONS[function]
    if function is F.pad and len(node.args) > 1 and isinstance(node.args[1], (tuple, list)):
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        return mode in _COMMUTING_MODES and len(node.args[1]) <= 2 * beside
    return function is F.interpolate and beside == len(shape_of(node) or ()) - 2


def _is_mean(options: dict[str, Any]) -> bool:
    """Whether the weights of an average pooling with these options sum to 1."""
    padded = any(_each(options["padding"])) and options["count_include_pad"]
    return not padded and not options["ceil_mode"] and options["divisor_override"] is None


def moved(node: fx.Node, module: nn.Module | None) -> dict[int, int] | None:
    """For a node that only rearranges axes: a map from axes of its first argument to its own, without merged and split axes."""
    before, after = shape_of(node.args[0]) if node.args else None, shape_of(node)
    if before is None or after is None:
        return None
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    rank, given = len(before), tuple[Any, ...](node.args[1:])
    if node.op == "call_module" and type(module) is not nn.Flatten:
        return None
    if name in ("transpose", "swapaxes", "permute") and not all(map(_static, given)):
        return None
    if name in ("transpose", "swapaxes") and len(given) == 2:
        first, second = (axis % rank for axis in given)
        return {axis: second if axis == first else first if axis == second else axis for axis in range(rank)}
    if name == "permute" and given:
        order = given[0] if isinstance(given[0], (tuple, list)) else given
        return {axis % rank: at for at, axis in enumerate(order)}
    if type(module) is nn.Flatten or name in ("flatten", "view", "reshape", "reshape_as"):
        found = {axis: axis for axis in range(min(rank, len(after))) if before[: axis + 1] == after[: axis + 1]}
        # counted from the end: trailing axes with the same sizes do not move
        for back in range(1, min(rank, len(after)) + 1):
            if before[-back:] != after[-back:]:
                break
            found.setdefault(rank - back, len(after) - back)
        return found
    if name == "mean":
        return _remaining(node, rank)
    return None


def flattened(node: fx.Node, module: nn.Module | None, axis: int) -> tuple[int, int] | None:
    """For a node that flattens the channels with all axes after them: the new axis, and the number of values per channel."""
    before, after = shape_of(node.args[0]) if node.args else None, shape_of(node)
    flattens = type(module) is nn.Flatten or node.target in ("flatten", torch.flatten)
    if not flattens or before is None or after is None or axis >= len(after):
        return None
    if (
        axis >= 1
        and before[:axis] == after[:axis]
        and len(after) == axis + 1
        and after[axis] == math.prod(before[axis:])
    ):
        return axis, math.prod(before[axis + 1 :])
    return None


def operands(node: fx.Node) -> tuple[list[fx.Node], bool] | None:
    """The two values that a node adds, and whether it subtracts the second; None if it does neither."""
    if node.op == "call_method":
        kind = {"add": False, "add_": False, "sub": True, "sub_": True}.get(str(node.target))
    elif node.op == "call_function":
        kind = False if node.target in ADDITIONS else True if node.target in SUBTRACTIONS else None
    else:
        kind = None
    if kind is None or node.kwargs or len(node.args) != 2:
        return None
    values = [value for value in node.args if isinstance(value, fx.Node)]
    same = len(values) == 2 and shape_of(values[0]) == shape_of(values[1]) == shape_of(node) is not None
    return (values, kind) if same else None


def concatenated(node: fx.Node) -> tuple[list[fx.Node], int] | None:
    """The values that a node concatenates, and the axis; None if it does not."""
    shape = shape_of(node)
    given: Any = node.args
    if node.target not in CONCATENATIONS or shape is None or not given:
        return None
    axis: Any = given[1] if len(given) > 1 else node.kwargs.get("dim", 0)
    values = given[0]
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, fx.Node) for v in values) or not _static(axis):
        return None
    return list(values), axis % len(shape)


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape that `Shapes` noted for a node, or None."""
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


class Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every value."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = n.meta[CONSTANT] if CONSTANT in n.meta else super().run_node(n)
        if isinstance(result, torch.Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


def _remaining(node: fx.Node, rank: int) -> dict[int, int] | None:
    """For a mean: a map from the axes that remain to the axes of the result. A mean is linear, and the mean of ones is one."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if axes is None or not _static(axes) or "dtype" in node.kwargs:
        return None
    gone = {axis % rank for axis in _each(axes)}
    left = [axis for axis in range(rank) if axis not in gone]
    return {axis: axis if keeps else left.index(axis) for axis in left}


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _static(value: Any) -> bool:
    return all(isinstance(each, int) for each in _each(value))
