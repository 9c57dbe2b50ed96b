"""Folding batch norms into their neighbors, for inference, with a numeric check of the result.

In inference a batch norm is an affine function of each channel, which linear layers before or after it can absorb. The graph of the model
is traced on a copy. The copy's linear layers get new weights, and an `Identity` or its activation replaces each folded batch norm. All
other modules stay, so the folded model still has its class.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm import memory
from batchnorm.errors import ArgumentError, FoldingError, InputError, StateError
from batchnorm.folding.branches import Merging
from batchnorm.folding.fold import Folding
from batchnorm.folding.norms import is_norm
from batchnorm.folding.record import Record, call, difference, example, largest, tensors
from batchnorm.folding.report import Folded, FoldReport, Merged
from batchnorm.folding.weights import LINEAR
from batchnorm.logs import logger
from batchnorm.surgery import walk
from batchnorm.surgery.absorb import release_activations
from batchnorm.surgery.rewritten import restore_forwards
from batchnorm.surgery.tracing import Rules, Traced, Tracer, copied, trace_modules

_ROUNDS, _SECONDS = 3, 0.2  # at least this many rounds, and this many seconds, to time both models


def fold(model: nn.Module, example_input: Any, *, tolerance: float = 1e-4) -> tuple[nn.Module, FoldReport]:
    """Fold the batch norms of a model into its convolutions and linear layers, for inference; the model itself does not change.

    Args:
        model: may have torch's and our layers, frozen ones included. Its running statistics are folded, in training mode too.
        example_input: the arguments of one call: a tensor, a tuple of arguments, or a dict of named ones. The model is traced with it, and
            the result is checked with it.
        tolerance: the largest accepted difference between the outputs of both models, for outputs of at most 1; for larger outputs, it
            is multiplied by the largest one.

    Returns:
        The folded copy, in inference mode, and a report of what was folded, what was not, and why.

    Raises:
        ArgumentError: if model is not a module, or example_input is not a valid input.
        InputError: if tolerance is negative, or the example is empty.
        StateError: if layers are still lazy, or the model cannot be copied.
        FoldingError: if the outputs differ by more than the tolerance.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if not tolerance >= 0:
        raise InputError(f"tolerance must be a number of at least 0, but got {tolerance}")
    if any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        raise StateError("fold needs layers of known size, but some are still lazy; call the model once first")
    args, kwargs = example(example_input)
    given = list(tensors((args, kwargs)))
    if given and not any(value.numel() for value in given):
        raise InputError("the example must have at least one sample, but all its tensors are empty")
    original = copied(model).eval()
    folded = copied(original)
    _separate(folded)
    restore = _restoring(folded)
    traced, folding, counts = _fold(folded, args, kwargs)
    folded = folding.replacements.get(id(folded), folded)
    merging = _merge(folded, args, kwargs)
    _note_left(folded, folding, counts)
    wanted = call(original, args, kwargs)
    restore()
    error, scale = difference(call(folded, args, kwargs), wanted), largest(wanted)
    if not error <= tolerance * max(1.0, scale):
        raise FoldingError(
            f"the folded model must return what the model returns, within {tolerance:g} for outputs up to 1, but differs by {error:.3g} "
            f"for outputs up to {scale:.3g}; the model did not change. Fold in float64 (model.double()), or give a larger tolerance if "
            "this is rounding"
        )
    for pair in (*folding.folded, *merging.folded):
        logger.info("fold: %s is folded into %s (%s)", pair.batch_norm, ", ".join(pair.into), pair.kind)
    for merge in merging.merged:
        logger.info("fold: %s are now one convolution, %s", ", ".join(merge.branches), merge.convolution)
    for name, reason in folding.left.items():
        logger.info("fold: left %s: %s", name, reason)
    before, after = _medians(model, lambda: call(original, args, kwargs), lambda: call(folded, args, kwargs))
    restore()
    report = FoldReport(
        folded=(*folding.folded, *merging.folded),
        merged=tuple(merging.merged),
        left=folding.left,
        untraced=traced.failures,
        max_error=error,
        largest_output=scale,
        tolerance=tolerance,
        seconds_before=before,
        seconds_after=after,
        parameters_before=_numbers(original),
        parameters_after=_numbers(folded),
        batch_norms_before=_norms(original),
        batch_norms_after=_norms(folded),
    )
    return folded, report


def _fold(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Traced, Folding, Counter[int]]:
    record, folding = Record(model, args, kwargs), Folding(model)
    traced = trace_modules(model, Rules(record.concrete, _is_leaf, record.accept, (Tracer, record.tracer)))
    for module in traced.modules:
        folding.fold(module, record)
    folding.apply()
    return traced, folding, record.counts


def _note_left(model: nn.Module, folding: Folding, counts: Counter[int]) -> None:
    """Let `folding.left` name each remaining batch norm once, and nothing else."""
    norms = {slot.path or "the model": slot.module for slot in walk(model) if is_norm(slot.module)}
    folding.left = {name: reason for name, reason in folding.left.items() if name in norms}
    named = {id(norms[name]) for name in folding.left}
    for name, norm in norms.items():
        if id(norm) not in named:
            named.add(id(norm))
            folding.left[name] = "its module could not be traced" if counts[id(norm)] else "it is not called"


def _restoring(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the buffers of a model; modules may count calls in buffers."""
    originals = {id(value): value.clone() for value in model.buffers()}
    owners = [(module, name, value) for module in model.modules() for name, value in module._buffers.items()]

    def restore() -> None:
        values = {key: value.clone() for key, value in originals.items()}
        for module, name, value in owners:
            if value is not None:
                module._buffers[name] = values[id(value)]

    return restore


def _merge(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Merging:
    record, merging = Record(model, args, kwargs), Merging()
    rules = Rules(record.concrete, _is_leaf, record.accept)
    merging.merge(model, record, trace_modules(model, rules), rules)
    return merging


def _separate(model: nn.Module) -> None:
    """Undo `fuse`, and remove the hooks that save memory in training."""
    slots = list(walk(model))
    for slot in slots:
        memory.detach(slot.module)
    restore_forwards(slots)
    release_activations(slots)


def _medians(model: nn.Module, *functions: Callable[[], Any]) -> list[float]:
    """Median seconds of each function, called alternately so that a busy machine slows all of them equally."""
    devices = {value.device for value in (*model.parameters(), *model.buffers()) if value.device.type != "cpu"}
    samples: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    while len(samples[0]) < _ROUNDS or time.perf_counter() - start < _SECONDS:
        for function, taken in zip(functions, samples, strict=True):
            begun = time.perf_counter()
            function()
            for device in devices:
                torch.accelerator.synchronize(device)
            taken.append(time.perf_counter() - begun)
    return [statistics.median(taken) for taken in samples]


def _numbers(model: nn.Module) -> int:
    values = {id(value): value for value in (*model.parameters(), *model.buffers()) if value.is_floating_point()}
    return sum(value.numel() for value in values.values())


def _is_leaf(module: nn.Module, _: str) -> bool:
    return is_norm(module) or (isinstance(module, LINEAR) and not any(map(is_norm, module.modules())))


def _norms(model: nn.Module) -> int:
    return sum(is_norm(module) for module in model.modules())


__all__ = ["FoldReport", "Folded", "Merged", "fold"]
