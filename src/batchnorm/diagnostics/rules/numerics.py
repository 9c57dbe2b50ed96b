"""BN5: numbers that are not finite, or not exact enough."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.diagnostics import thresholds as at
from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.record import LayerRecord, stacked
from batchnorm.diagnostics.rule import Found, Rule, worst_first


def _poisoned(case: Case) -> Iterator[Found]:
    names, channels, negative = list[str](), 0, 0
    for norm in case.norms:
        pair = norm.statistics()
        if pair is None:
            continue
        broken = ~(pair[0].isfinite() & pair[1].isfinite())
        below = pair[1] < 0
        if bool((broken | below).any()):
            names.append(norm.name)
            channels += int((broken | below).sum())
            negative += int(below.sum())
    if names:
        yield Found(
            tuple(names),
            {"channels": channels, "negative_variances": negative},
            f"{channels} channels have running statistics that are NaN, infinite or negative: inference returns NaN",
        )


def _half(case: Case) -> Iterator[Found]:
    found, training = dict[str, torch.dtype](), False
    for norm in case.norms:
        values = (norm.tensor("mean"), norm.tensor("var"))
        half = [value.dtype for value in values if value is not None and value.dtype in (torch.float16, torch.bfloat16)]
        if half and norm.updates:
            found[norm.name] = half[0]
            training |= norm.module.training
    if found:
        dtype = next(iter(found.values()))
        name = str(dtype).removeprefix("torch.")
        digits = torch.finfo(dtype).eps
        yield Found(
            tuple(found),
            {"dtype": name, "precision": digits},
            f"running statistics are {name}: an update below {digits:.1g} of their value is lost",
            "warning" if training else "note",
        )


def _rounding(layer: LayerRecord) -> float:
    """The error of rounding the input, in standard deviations of the channel where it is largest.

    Constant channels count where they are many: rounding may have made them constant.
    """
    means, variances = stacked(layer)
    eps = layer.norm.eps or 1e-5
    varying = variances > eps
    if bool((~varying).all(0).double().mean() > at.DEAD_SHARE):
        varying = variances > -1
    relative = torch.where(varying, means.abs() / (variances.clamp(min=0) + eps).sqrt(), 0.0)
    return relative.max().item() * layer.precision


def _cancellation(case: Case) -> Iterator[Found]:
    errors = {name: _rounding(layer) for name, layer in case.record.layers.items() if layer.batches}
    names = worst_first(errors, at.CANCELLATION)
    if names:
        yield Found(
            tuple(names),
            {"rounding_error_in_deviations": errors[names[0]]},
            f"the mean is so large that rounding the input costs {errors[names[0]]:.2g} standard deviations",
        )
        return
    errors = {name: layer.kernel_error for name, layer in case.record.layers.items()}
    names = worst_first(errors, at.KERNEL)
    if names:
        yield Found(
            tuple(names),
            {"kernel_error_in_deviations": errors[names[0]]},
            f"the mean is so large that torch's kernel for channels_last is {errors[names[0]]:.2g} standard deviations off; "
            "our layers (bn.convert) are not",
        )


def _overflow(case: Case) -> Iterator[Found]:
    first = next(((name, layer) for name, layer in case.record.layers.items() if layer.nonfinite), None)
    if first is not None:
        name, layer = first
        yield Found(
            (name,),
            {"batches": layer.nonfinite},
            f"NaN or Inf in the input of {layer.nonfinite} of {case.record.batches} batches; in training they poison the "
            "running statistics",
        )


RULES = (
    Rule(
        "BN501",
        "poisoned running statistics",
        "error",
        (),
        "One batch with an overflow makes the moving average NaN or Inf forever. Training goes on, since it normalizes "
        "by the batch; inference returns NaN.",
        "bn.convert(model)  # whose layers skip such batches; then bn.recalibrate(model, loader)",
        "layer.reset_running_stats()  # and more batches in training mode",
        _poisoned,
        fixable=True,
    ),
    Rule(
        "BN502",
        "running statistics in half precision",
        "warning",
        (),
        "A moving average adds small changes to large values. In float16 and bfloat16 they are rounded away. A note in inference mode.",
        "bn.convert(model)  # keeps buffers in float32 when the model is cast",
        "for layer in norms: layer.float()",
        _half,
        fixable=True,
    ),
    Rule(
        "BN503",
        "cancellation",
        "warning",
        ("loader",),
        "If the mean is much larger than the deviation, the differences from the mean are what rounding left of them. "
        "Measured as "
        "|mean| / deviation of the worst channel, times the precision of the input's dtype, above .1; and for torch's layers on "
        "channels_last input with a mean of more than 300 deviations, by the error of their output, above .002 deviations.",
        "x = x - offset  # subtract a constant, or normalize in float32",
        "x = x - offset  # subtract a constant, or normalize in float32",
        _cancellation,
    ),
    Rule(
        "BN504",
        "NaN or Inf in the input",
        "error",
        ("loader",),
        "A layer gets values that are not finite. Reported for the first layer in the order of calls; the others inherit them.",
        'bn.convert(model)  # whose layers skip such batches, on_nonfinite="skip"',
        "torch.isfinite(x).all()  # find the batch",
        _overflow,
    ),
)
