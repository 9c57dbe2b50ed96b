"""The verbs in C++ for the CPU: csrc/, compiled into one library beside this file and registered as operators `batchnorm::*`.

The kernels read and write memory no more often than the formulas require; csrc/kernels/planar.h and interleaved.h explain how. When the
library is loaded, it selects a build for the processor. One library serves all versions of torch: csrc/torch/torch_shim.cpp looks up the
functions that it uses at run time.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.activation import Activation
from batchnorm.kernels.contract import (
    Backward,
    Epilogue,
    Forward,
    Groups,
    Normalized,
    Running,
    Step,
    Steps,
    Update,
    sum_of_weights,
    values_per_channel,
)
from batchnorm.kernels.correction import Correction, Renormalization
from batchnorm.moments import Moments
from batchnorm.torch_state import differentiated_by_torch, has_kernel, is_tracing

name = "cpu"
fuses = True

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuses(x: Tensor, epilogue: Epilogue, plain: bool = True) -> str | None:  # noqa: ARG001 (the contract's signature)
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if _library.unavailable is not None:
        _warn_once()
        return _library.unavailable
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if code(epilogue.activation) is None:
        return f"the C++ kernels have no {epilogue.activation}"
    if not (x.is_contiguous() or _is_interleaved(x)):
        return "x is neither (N, C, *S) nor (N, *S, C) in memory"
    for beside in (epilogue.residual, epilogue.output):
        if beside is not None and beside.dtype != x.dtype:
            return f"the residual is {beside.dtype} and x is {x.dtype}"
    return epilogue.wider_than(x)


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    mask = _whole(mask, x)
    count = None if mask is None else _counted_by(mask)
    mean, m2 = torch.ops.batchnorm.moments.default(x, mask, count, None)
    return Moments(values_per_channel(x) if count is None else count, mean, m2)


def weighted_moments(x: Tensor, sample_weights: Tensor) -> Moments:
    count = sum_of_weights(x, sample_weights)
    mean, m2 = torch.ops.batchnorm.moments.default(x, None, count, _whole(sample_weights, x))
    return Moments(count, mean, m2)


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> Tensor:
    return torch.ops.batchnorm.normalize.default(x, mean, rstd, *_arguments(x, epilogue))


def infer(
    x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.batchnorm.infer.default(x, running_mean, running_var, eps, *_arguments(x, epilogue))


def reduce_grad(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    arguments = _arguments(x, epilogue)
    return torch.ops.batchnorm.reduce_grad.default(dy, x, mean, rstd, *arguments, epilogue.output is not None)


def input_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    epilogue: Epilogue,
    mean_grads: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    wants_dresidual, is_output = epilogue.has_residual, epilogue.output is not None
    weights, mask = epilogue.sample_weights, epilogue.mask
    if weights is not None:
        weights = _whole(weights if mask is None else torch.where(mask, weights, -1.0), x)
        epilogue = epilogue._replace(mask=None)
    dx, dresidual = torch.ops.batchnorm.input_grad.default(
        dy, x, mean, rstd, *(mean_grads or (None, None)), weights, *_arguments(x, epilogue), is_output, wants_dresidual
    )
    return dx, dresidual if wants_dresidual else None


def forward(x: Tensor, eps: float, epilogue: Epilogue, groups: Groups | None = None) -> Forward:
    arguments = _arguments(x, epilogue)
    if groups is not None:
        y, counts, mean, m2, rstd = torch.ops.batchnorm.forward_groups.default(x, *groups, eps, *arguments)
        return Forward(y, Moments(counts, mean, m2), rstd)
    mask = arguments[3]
    count = None if mask is None else _counted_by(mask)
    y, mean, m2, rstd = torch.ops.batchnorm.forward.default(x, count, eps, *arguments)
    return Forward(y, Moments(values_per_channel(x) if count is None else count, mean, m2), rstd)


def forward_renormalized(x: Tensor, eps: float, epilogue: Epilogue, renormalization: Renormalization) -> Forward:
    arguments = _arguments(x, epilogue)
    mask = arguments[3]
    count = None if mask is None else _counted_by(mask)
    y, mean, m2, rstd, *correction = torch.ops.batchnorm.forward_renormalized.default(
        x, count, eps, *renormalization, *arguments
    )
    moments = Moments(values_per_channel(x) if count is None else count, mean, m2)
    return Forward(y, moments, rstd, Correction(*correction))


def backward(
    dy: Tensor,
    x: Tensor,
    by: Normalized,
    epilogue: Epilogue,
    needs_input_grad: bool = True,
    groups: Groups | None = None,
) -> Backward:
    mean, rstd, count, _ = by
    wants_dresidual, is_output = epilogue.has_residual, epilogue.output is not None
    arguments = _arguments(x, epilogue)
    if groups is not None:
        dx, dresidual, *sums = torch.ops.batchnorm.backward_groups.default(
            dy, x, mean, rstd, *groups, *arguments, is_output, wants_dresidual, needs_input_grad
        )
        return Backward(dx if needs_input_grad else None, dresidual if wants_dresidual else None, *sums)
    other_count = count if isinstance(count, Tensor) else None
    if isinstance(count, int) and count != values_per_channel(x):
        other_count = torch.full((), count, dtype=torch.float64)
    dx, dresidual, sum_grad, sum_grad_xhat = torch.ops.batchnorm.backward.default(
        dy,
        x,
        mean,
        rstd,
        other_count,
        count is None,
        *arguments,
        is_output,
        wants_dresidual,
        needs_input_grad,
    )
    return Backward(dx if needs_input_grad else None, dresidual if wants_dresidual else None, sum_grad, sum_grad_xhat)


def takes_update(running: Running, moments: Moments, update: Update) -> bool:
    """Not while compiling: a compiler fuses plain operators."""
    mean, variance, *counters = running
    return (
        _library.unavailable is None
        and isinstance(update.momentum, float)
        and update.unless is None
        and (mean.dtype is torch.float32 or mean.dtype is torch.float64)
        and variance.dtype is mean.dtype
        and moments.mean.dtype is torch.float64
        and mean.is_cpu
        and variance.is_cpu
        and moments.mean.is_cpu
        and all(counter is None or (counter.is_cpu and counter.dtype is torch.int64) for counter in counters)
        and not torch.compiler.is_compiling()
        and not is_tracing()  # a trace counts values by tensors
        and not differentiated_by_torch()
    )


def update_running(running: Running, moments: Moments, update: Update) -> Tensor | None:
    count, mean, m2 = moments
    masked, whole = (count, 0.0) if isinstance(count, Tensor) else (None, float(count))
    momentum, unbiased, skip_nonfinite, _ = update
    finite = torch.ops.batchnorm.update_running.default(
        *running, mean, m2, masked, whole, momentum, unbiased, skip_nonfinite
    )
    return finite if skip_nonfinite else None


def steps_for(x: Tensor, running_mean: Tensor) -> Steps | None:
    if not (x.is_cpu and running_mean.is_cpu):
        return None
    if _STEPS is None:
        _warn_once()
    return _STEPS


def status() -> str:
    return unavailable() or f"C++, {instruction_set()} (built for {', '.join(builds())})"


def unavailable() -> str | None:
    """Why these kernels cannot be used on this machine, or None if they can."""
    return _library.unavailable


def instruction_set() -> str | None:
    """Which of the library's builds runs here: "AVX-512 BF16", "AVX-512", "AVX2" or "baseline"; None without the library."""
    return _library.instruction_set


def builds() -> tuple[str, ...]:
    """The names of the library's builds, the fastest first, whether this processor runs them or not."""
    return _library.builds


def say_recomputation(active: bool | None) -> None:
    """Tell the library what `bn.recomputation` says on this thread, or None: its operator `recomputing` asks no Python."""
    if _library.say_recomputation is not None:
        _library.say_recomputation(-1 if active is None else active)


def _arguments(
    x: Tensor, epilogue: Epilogue
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, float]:
    weight, bias, residual, mask, activation, output, _ = epilogue
    mask = _whole(mask, x)
    residual = residual if output is None else output
    known = code(activation)
    assert known is not None, "`refuses` was asked"
    return weight, bias, residual, mask, *known


def code(activation: Activation | None) -> tuple[int, float] | None:
    """The number of an activation in the library, and its slope; None if the library does not have it."""
    if activation is None:
        return 0, 0.0
    number = _library.activations.get(activation.name)
    return None if number is None else (number, activation.negative_slope)


def _whole(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask, or sample weights, as (N, 1, *S) without gaps."""
    return None if mask is None else mask.expand(x.shape[0], 1, *x.shape[2:]).contiguous()


def _counted_by(mask: Tensor) -> Tensor:
    """How many values of each channel a whole mask counts."""
    return mask.sum(dtype=torch.float64)


def _is_interleaved(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


class _Library(NamedTuple):
    """Properties of the compiled library.

    Attributes:
        unavailable: why it cannot be used here, or None if it can.
        instruction_set: the build that runs here.
        builds: all builds that it has.
        activations: their numbers by name.
        say_recomputation: its function behind the one of this module.
        in_torchs_node: whether a training step is recorded by a node of torch's own, see csrc/torch/node.h.
    """

    unavailable: str | None
    instruction_set: str | None = None
    builds: tuple[str, ...] = ()
    activations: Mapping[str, int] = {}
    say_recomputation: Callable[[int], None] | None = None
    in_torchs_node: bool = False


def _load() -> _Library:
    """Load the library and register its operators."""
    path = Path(__file__).with_name("_cpu.so")
    if not path.exists():
        return _Library("the C++ kernels were not built (is there a C++ compiler?)")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return _Library(f"the C++ kernels could not be loaded: {error}")
    for function in (
        library.batchnorm_register,
        library.batchnorm_register_in_torchs_node,
        library.batchnorm_operator_of_node,
        library.batchnorm_key_of_node,
        library.batchnorm_schema,
        library.batchnorm_instruction_set,
        library.batchnorm_build_name,
        library.batchnorm_activation_name,
    ):
        function.restype = ctypes.c_char_p
    found = _texts(library.batchnorm_build_name)
    running = library.batchnorm_instruction_set()
    if running is None:
        other = f"the C++ kernels were built for {' and '.join(found)}, which this processor does not run"
        return _Library(f"{other}; install with BATCHNORM_BUILDS=all", builds=found)
    schemas = {schema.partition("(")[0]: schema for schema in _texts(library.batchnorm_schema)}
    for operator, schema in schemas.items():
        torch.library.define(f"batchnorm::{operator}", schema.removeprefix(operator))
    problem = library.batchnorm_register()
    if problem is not None:
        return _Library(f"the C++ kernels do not fit torch {torch.__version__}: {problem.decode()}", builds=found)
    for operator in schemas:
        torch.library.register_fake(f"batchnorm::{operator}", _FAKES[operator])
    activations = {name: number for number, name in enumerate(_texts(library.batchnorm_activation_name))}
    library.batchnorm_say_recomputation.restype = None
    say_recomputation = library.batchnorm_say_recomputation
    return _Library(None, running.decode(), found, activations, say_recomputation, _joins_torchs_node(library))


def _joins_torchs_node(library: Any) -> bool:
    """Whether the library's kernels now are those of torch's autograd node; not if another library has kernels there."""
    operators, keys = _texts(library.batchnorm_operator_of_node), _texts(library.batchnorm_key_of_node)
    if any(has_kernel(f"aten::{operator}", key) for operator, key in zip(operators, keys, strict=True)):
        return False
    return library.batchnorm_register_in_torchs_node() is None


def _texts(function: Any) -> tuple[str, ...]:
    """The texts that a function of the library returns for 0, 1, 2 ..., until it returns null."""
    texts = (function(number) for number in itertools.count())
    return tuple(text.decode() for text in itertools.takewhile(lambda text: text is not None, texts))


def _like(x: Tensor) -> Tensor:
    return x.new_empty_strided(x.shape, x.stride())


def _channels(x: Tensor, *groups: int) -> Tensor:
    return x.new_empty((*groups, x.shape[1]), dtype=torch.float64)


def _step(x: Tensor, rows: int = 2) -> tuple[Tensor, Tensor]:
    return _like(x), x.new_empty((rows, x.shape[1]), dtype=torch.float64)


def _step_backward(x: Tensor, _: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants_dresidual, wants_dx = rest[-2:]
    dx, dresidual = (_like(x) if wanted else x.new_empty(0) for wanted in (wants_dx, wants_dresidual))
    if weight is None:
        return dx, x.new_empty(0), x.new_empty(0), dresidual
    return dx, weight.new_empty(x.shape[1]), weight.new_empty(x.shape[1]), dresidual


# What the operators return, for tracing: shapes, strides and dtypes without values. Their schemas stand in csrc/torch/, beside their
# functions.
_FAKES = {
    "moments": lambda x, *_: (_channels(x), _channels(x)),
    "forward": lambda x, *_: (_like(x), _channels(x), _channels(x), _channels(x)),
    "forward_renormalized": lambda x, *_: (_like(x), *(_channels(x) for _ in range(5))),
    "forward_groups": lambda x, groups, *_: (
        _like(x),
        x.new_empty(groups, dtype=torch.float64),
        *(_channels(x, groups) for _ in range(3)),
    ),
    "normalize": lambda x, *_: _like(x),
    "infer": lambda x, *_: (_like(x), _channels(x), _channels(x)),
    "reduce_grad": lambda _, x, *__: (_channels(x), _channels(x)),
    "input_grad": lambda _, x, *rest: (_like(x), _like(x) if rest[-1] else x.new_empty(0)),
    "backward": lambda _, x, *rest: (
        _like(x) if rest[-1] else x.new_empty(0),
        _like(x) if rest[-2] else x.new_empty(0),
        _channels(x),
        _channels(x),
    ),
    "backward_groups": lambda _, x, __, ___, groups, *rest: (
        _like(x) if rest[-1] else x.new_empty(0),
        _like(x) if rest[-2] else x.new_empty(0),
        _channels(x, groups),
        _channels(x, groups),
    ),
    "update_running": lambda running_mean, *_: running_mean.new_empty((), dtype=torch.bool),
    "node_backward": lambda x, _, weight, *__: (
        _like(x),
        weight.new_empty(x.shape[1]),
        weight.new_empty(x.shape[1]),
    ),
    "update_after": lambda *_: True,
    "training_step": lambda x, *_: _step(x),
    "renormalization_step": lambda x, *_: _step(x, 4),
    "inference_step": lambda x, *_: _step(x),
    "training_step_backward": lambda _, x, *rest: _step_backward(x, *rest),
    "inference_step_backward": lambda _, x, *rest: _step_backward(x, *rest),
}

# Their names in `torch.ops.batchnorm`.
OPERATORS = tuple(_FAKES)

_library = _load()


def _steps() -> Steps:
    """Operators that are called as their schemas say, without torch's frame around them: it costs as much as a tiny tensor's arithmetic."""
    operators = torch.ops.batchnorm
    training, training_backward = operators.training_step.default._op, operators.training_step_backward.default._op
    inference, inference_backward = operators.inference_step.default._op, operators.inference_step_backward.default._op
    in_torchs_node = _in_torchs_node(operators.update_after.default._op) if _library.in_torchs_node else None
    kernel: Any = sys.modules[__name__]
    return Steps(
        Step(training, training_backward, False, code, kernel, in_torchs_node),
        Step(operators.renormalization_step.default._op, training_backward, False, code, kernel),
        Step(inference, inference_backward, True, code, kernel),
    )


def _in_torchs_node(update_after: Callable[..., bool]) -> Callable[..., Tensor | None]:
    """A training step that torch's own node records: for a tiny tensor, one in Python costs as much as the rest of the step."""
    forward = torch.cudnn_batch_norm

    def step(x: Tensor, weight: Tensor, bias: Tensor | None, given: tuple[Any, ...]) -> Tensor | None:
        running_mean, running_var, updates, nonfinite_batches, *update, eps = given
        y, _, _, reserve = forward(x, weight, bias, None, None, True, 0.0, eps)
        updated = y.numel() and update_after(reserve, running_mean, running_var, updates, nonfinite_batches, *update)
        return y if updated else None

    return step


_STEPS = None if _library.unavailable is not None else _steps()
_warned = _library.unavailable is None


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"on the CPU batchnorm runs torch's own operators, with torch's speed and accuracy: {_library.unavailable}",
            RuntimeWarning,
            stacklevel=2,
        )
