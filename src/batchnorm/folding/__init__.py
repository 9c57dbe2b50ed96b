"""Folding batch norms into their neighbors, for inference, with a numeric check of the result.

In inference a batch norm is an affine function of each channel, which linear layers before or after it can absorb. The graph of the model
is traced on a copy. The copy's linear layers get new weights, and an `Identity` or its activation replaces each folded batch norm. All
other modules stay, so the folded model still has its class. For quantization-aware training, `pairs` hold both layers, which keep learning.
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
from batchnorm.folding.pairing import Pairing
from batchnorm.folding.pairs import FakeQuantizer, FoldedPair, exactly_quantized, make_quantizers, taken_apart, unfold
from batchnorm.folding.record import Record, call, difference, example, largest, tensors
from batchnorm.folding.report import Folded, FoldReport, Merged
from batchnorm.folding.weights import LINEAR
from batchnorm.logs import logger
from batchnorm.surgery import walk
from batchnorm.surgery.absorb import release_activations
from batchnorm.surgery.rewritten import restore_forwards
from batchnorm.surgery.tracing import Rules, Traced, Tracer, copied, first_line, trace_modules

_ROUNDS, _SECONDS = 3, 0.2  # at least this many rounds, and this many seconds, to time both models


def fold(
    model: nn.Module,
    example_input: Any,
    *,
    tolerance: float = 1e-4,
    train: bool = False,
    weight_fake_quant: Callable[[], FakeQuantizer] | None = None,
) -> tuple[nn.Module, FoldReport]:
    """Fold the batch norms of a model into its convolutions and linear layers; the model itself does not change.

    For inference, the batch norms disappear into the weights. With `train=True`, for quantization-aware training, each batch norm that
    directly follows a convolution or linear layer and this layer become a `FoldedPair`, which goes on learning, with batch statistics in
    training, and quantizes the weights that inference will use. Such a model can be folded for inference when it is trained, and `unfold`
    undoes it.

    Args:
        model: may have torch's and our layers, frozen ones included. Its running statistics are folded, in training mode too.
        example_input: the arguments of one call: a tensor, a tuple of arguments, or a dict of named ones. The model is traced with it, and
            the result is checked with it; with `train=True` in training mode too, so it must be a batch to train with.
        tolerance: the largest accepted difference between the outputs of both models, for outputs of at most 1; for larger outputs, it
            is multiplied by the largest one.
        train: fold for training.
        weight_fake_quant: with `train=True`, a function that returns a new fake quantizer for the weights of each pair, as those of
            `torch.ao.quantization` and torchao; a fake quantizer is a module or another function that takes and returns weights.

    Returns:
        The folded copy, in inference mode, or with `train=True` in the model's, and a report of what was folded, what was not, and why.

    Raises:
        ArgumentError: if model is not a module, example_input is not a valid input, or weight_fake_quant is not such a function.
        InputError: if tolerance is negative, the example is empty, or the model cannot train with it.
        StateError: if layers are still lazy, the model cannot be copied, or half of a `FoldedPair` was taken out of it.
        FoldingError: if the outputs differ by more than the tolerance.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if not tolerance >= 0:
        raise InputError(f"tolerance must be a number of at least 0, but got {tolerance}")
    if weight_fake_quant is not None and not train:
        raise ArgumentError("weight_fake_quant is for training, but train is False; pass train=True, or leave it out")
    if any(is_lazy(value) for value in (*model.parameters(), *model.buffers())):
        raise StateError("fold needs layers of known size, but some are still lazy; call the model once first")
    args, kwargs = example(example_input)
    given = list(tensors((args, kwargs)))
    if given and not any(value.numel() for value in given):
        raise InputError("the example must have at least one sample, but all its tensors are empty")
    original = copied(model)
    folded = copied(original)
    modes = {id(module): module.training for module in folded.modules()}
    original.eval()
    folded.eval()
    wanted = call(original, args, kwargs)
    pairs = list[FoldedPair]()
    if not train:
        folded, pairs = taken_apart(folded)
    _separate(folded)
    restore = _restoring(folded)
    folding = Pairing(folded) if train else Folding(folded)
    for pair in pairs:
        if isinstance(folding, Folding) and (weight := exactly_quantized(pair)) is not None:
            folding.quantize(pair.linear, weight, pair.batch_norm)
    traced, counts = _fold(folding, args, kwargs)
    folded = folding.replacements.get(id(folded), folded)
    # a kernel that contains others is no longer quantized as each was
    merges = isinstance(folding, Folding) and not folding.quantized
    merging = _merge(folded, args, kwargs) if merges else Merging()
    _note_left(folded, folding, counts)
    restore()
    found = _call_pairs(folded, args, kwargs) if train else call(folded, args, kwargs)
    error, scale = difference(found, wanted), largest(wanted)
    _check(error, scale, tolerance, "")
    for pair in (*folding.folded, *merging.folded):
        logger.info("fold: %s is folded into %s (%s)", pair.batch_norm, ", ".join(pair.into), pair.kind)
    for merge in merging.merged:
        logger.info("fold: %s are now one convolution, %s", ", ".join(merge.branches), merge.convolution)
    for name, reason in folding.left.items():
        logger.info("fold: left %s: %s", name, reason)
    before, after = _medians(model, lambda: call(original, args, kwargs), lambda: call(folded, args, kwargs))
    if isinstance(folding, Pairing):
        trained = _difference_in_training(original, folded, args, kwargs)
        _check(*trained, tolerance, " in training")
        error, scale = max((error, scale), trained, key=lambda each: each[0])
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
    if isinstance(folding, Pairing):
        _prepare_for_training(folded, folding, modes, weight_fake_quant)
    return folded, report


def _fold(folding: Folding | Pairing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Traced, Counter[int]]:
    record = Record(folding.model, args, kwargs)
    traced = trace_modules(folding.model, Rules(record.concrete, _is_leaf, record.accept, (Tracer, record.tracer)))
    for module in traced.modules:
        folding.fold(module, record)
    folding.apply()
    return traced, record.counts


def _call_pairs(folded: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of a model with pairs.

    Raises:
        FoldingError: if its forward does.
    """
    try:
        return call(folded, args, kwargs)
    except Exception as error:
        raise FoldingError(
            f"the folded model must run as the model does, but raises {type(error).__name__}: {first_line(error)}; the model did not "
            "change. Its code may read an attribute of a layer that is now in a pair; let it read that from elsewhere"
        ) from error


def _check(error: float, scale: float, tolerance: float, mode: str) -> None:
    if not error <= tolerance * max(1.0, scale):
        raise FoldingError(
            f"the folded model must return what the model returns{mode}, within {tolerance:g} for outputs up to 1, but differs by "
            f"{error:.3g} for outputs up to {scale:.3g}; the model did not change. Fold in float64 (model.double()), or give a larger "
            "tolerance if this is rounding"
        )


def _difference_in_training(
    original: nn.Module, folded: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float, float]:
    """The largest difference between the outputs of both models in training, with the same random numbers, and the largest output."""
    devices = {value.device for value in (*original.parameters(), *original.buffers()) if value.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            wanted = call(original.train(), args, kwargs)
    except Exception as error:
        raise InputError(
            f"with train=True the example must be a batch that the model can train with, but its forward in training raises "
            f"{type(error).__name__}: {first_line(error)}; give an example with more samples"
        ) from error
    with torch.random.fork_rng(devices):
        found = call(folded.train(), args, kwargs)
    return difference(found, wanted), largest(wanted)


def _prepare_for_training(
    folded: nn.Module,
    pairing: Pairing,
    modes: dict[int, bool],
    weight_fake_quant: Callable[[], FakeQuantizer] | None,
) -> None:
    """Give the modules the modes that they had, and the pairs their fake quantizers."""
    if weight_fake_quant is not None:
        for pair, quantizer in zip(pairing.pairs, make_quantizers(weight_fake_quant, len(pairing.pairs)), strict=True):
            device = pair.linear.weight.device
            pair.weight_fake_quant = quantizer.to(device) if isinstance(quantizer, nn.Module) else quantizer
    for module in folded.modules():
        module.training = modes.get(id(module), modes.get(id(folded), False))
    for pair in pairing.pairs:
        pair.train(pair.linear.training)


def _note_left(model: nn.Module, folding: Folding | Pairing, counts: Counter[int]) -> None:
    """Let `folding.left` name each remaining batch norm once, and nothing else."""
    slots = [slot for slot in walk(model) if is_norm(slot.module) and not isinstance(slot.parent, FoldedPair)]
    norms = {slot.path or "the model": slot.module for slot in slots}
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
    return (
        isinstance(module, FoldedPair)
        or is_norm(module)
        or (isinstance(module, LINEAR) and not any(map(is_norm, module.modules())))
    )


def _norms(model: nn.Module) -> int:
    return sum(is_norm(module) for module in model.modules())


__all__ = ["FoldReport", "Folded", "FoldedPair", "Merged", "fold", "unfold"]
