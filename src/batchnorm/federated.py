"""Running statistics of models that were trained apart: merged from their state_dicts, or left with each of them.

The moments of several data sets merge exactly (`moments.Moments.pooled`); the running statistics of a layer are such moments if they are
those of all its data. A plain average of variances, as in federated averaging of a whole state_dict, misses the variance between clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, InputError, ShapeError
from batchnorm.logs import logger
from batchnorm.moments import Moments
from batchnorm.surgery.walker import norms_of, slots_of

_MEAN, _VARIANCE, _COUNTER = "running_mean", "running_var", "num_batches_tracked"
_CONVENTIONS = ("unbiased", "biased")


@torch.no_grad()
def merge_statistics(
    state_dicts: Sequence[Mapping[str, Tensor]],
    counts: Sequence[float | Mapping[str, float]],
    *,
    running_variance: str = "unbiased",
) -> dict[str, Tensor]:
    """Merge the running statistics of several models into those of all their data, and return them as a part of a state_dict.

        n    = Σ n_i
        mean = Σ n_i mean_i / n
        M2   = Σ M2_i + Σ n_i (mean_i - mean)²        with M2_i = variance_i · (n_i - 1), or · n_i if biased

    (Chan, Golub & LeVeque 1983.) The second sum of M2 is the variance between the models' data, which a weighted average of variances
    misses. The result equals the statistics of the pooled data if each state holds those of its own data, as after `recalibrate`
    with the same parameters. A moving average of batches is only an estimate of them, so the result is one too.

    The running statistics of a layer, and of each of its `Domains`, are found by their names. A counter becomes the largest of its values.
    The windows of `MovingAverage` are left out. No other key enters the result: load it with `strict=False`, or update a state_dict.

    Args:
        state_dicts: one for each model, of the same architecture; torch's layers or ours.
        counts: for each model, how many values per channel its statistics are from: samples times positions. Either a number, or a mapping
            from the names of layers to numbers where their feature maps differ in size. With 0 a model's values are ignored.
        running_variance: "unbiased" if variances are M2 / (n - 1), as in torch's layers, or "biased" if they are M2 / n.

    Returns:
        Statistics and counters by their names in the first state_dict, in its dtypes and on its devices; computed in float64.

    Raises:
        ArgumentError: if state_dicts is a single state_dict.
        InputError: if there are no models, or not as many counts; if counts are negative, not finite, or all 0; on another convention; if
            a model lacks a layer or a count.
        ShapeError: if the models' layers differ in size.
    """
    if running_variance not in _CONVENTIONS:
        raise InputError(f'running_variance must be "unbiased" or "biased", but got {running_variance!r}')
    if isinstance(state_dicts, Mapping) or not all(isinstance(state, Mapping) for state in state_dicts):
        raise ArgumentError("state_dicts must be a sequence of state_dicts, one for each model; pass a list")
    if not state_dicts or len(state_dicts) != len(counts):
        raise InputError(
            f"there must be at least one state_dict and a count for each, but got {len(state_dicts)} and {len(counts)} counts"
        )
    merged = dict[str, Tensor]()
    for key in state_dicts[0]:
        prefix, _, name = key.rpartition(".")
        if name.startswith(_COUNTER):
            merged[key] = torch.stack(
                [value.to(_of(state_dicts[0], key).device) for value in _all(state_dicts, key)]
            ).amax(0)
        elif name.startswith(_MEAN):
            variance = key.removesuffix(name) + name.replace(_MEAN, _VARIANCE, 1)
            if variance not in state_dicts[0] or _of(state_dicts[0], key).dim() != 1:
                logger.warning("merge_statistics: left %s: only means and variances of all data merge", key)
                continue
            numbers = _numbers(counts, prefix)
            merged[key], merged[variance] = _merged(
                key, _all(state_dicts, key), _all(state_dicts, variance), numbers, running_variance == "unbiased"
            )
    if not merged:
        logger.warning("merge_statistics: the state_dicts have no running statistics")
    return {key: merged[key] for key in state_dicts[0] if key in merged}


def local_keys(model: nn.Module, *, affine: bool = True) -> tuple[str, ...]:
    """The names in a model's `state_dict` that belong to its batch norms, which a client of federated learning may keep to itself.

    With FedBN (Li et al. 2021, arXiv:2102.07623) clients exchange everything but their batch norms, because the data of each have
    statistics of their own. With `affine=False` these are the statistics alone, as in SiloBN (Andreux et al. 2020, arXiv:2008.07424), and
    weight and bias are shared. Names come from the layers, not from patterns such as "bn", so layers of any name are found: torch's, ours,
    their subclasses, frozen ones, and each name of a shared layer.

    Args:
        model: as it is on the clients.
        affine: whether weight and bias stay local too.

    Raises:
        ArgumentError: if model is not a module.
    """
    slots = slots_of(model)
    norms = {id(layer) for layer, _ in norms_of(slots)}
    local = set[str]()
    for slot in slots:
        if id(slot.module) in norms:
            prefix = f"{slot.path}." if slot.path else ""
            local |= {prefix + name for name in slot.module.state_dict() if _is_local(name, affine)}
    return tuple(key for key in model.state_dict() if key in local)


def _is_local(name: str, affine: bool) -> bool:
    """Whether an entry of a batch norm's state_dict is its own, not a submodule's, and stays with a client."""
    is_statistic = name.startswith((_MEAN, _VARIANCE, _COUNTER))
    own = "." not in name or name.startswith("parametrizations.")
    return own and (affine or is_statistic)


def _of(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise InputError(
            f"every state_dict must have the same layers, but one lacks {key}; merge models of one architecture"
        )
    return state[key]


def _all(state_dicts: Sequence[Mapping[str, Tensor]], key: str) -> list[Tensor]:
    return [_of(state, key) for state in state_dicts]


def _numbers(counts: Sequence[float | Mapping[str, float]], layer: str) -> list[float]:
    """The count of each model for one layer."""
    if any(isinstance(count, Mapping) and layer not in count for count in counts):
        raise InputError(f"counts by layer must name every layer with running statistics, but one lacks {layer!r}")
    numbers = [float(count[layer] if isinstance(count, Mapping) else count) for count in counts]
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or not any(numbers):
        raise InputError(
            f"counts must be finite, not negative, and not all 0, but got {numbers}; count the values per channel of each model"
        )
    return numbers


def _merged(
    key: str, means: list[Tensor], variances: list[Tensor], numbers: list[float], unbiased: bool
) -> tuple[Tensor, Tensor]:
    """The mean and the variance, (C,) each, of all models' data."""
    mean, variance = means[0], variances[0]
    if any(value.shape != mean.shape for value in (*means, *variances)):
        shapes = sorted({tuple(value.shape) for value in (*means, *variances)})
        raise ShapeError(f"{key} and its variance must have one shape in every state_dict, but they have {shapes}")
    counts = torch.tensor(numbers, dtype=torch.float64)
    has_data = (counts > 0).unsqueeze(1)
    tables = [torch.stack([_wide(value) for value in values]) for values in (means, variances)]  # (W, C) each
    center, spread = (torch.where(has_data, table, 0.0) for table in tables)
    degrees = (counts - 1).clamp(min=0) if unbiased else counts
    pooled = Moments.pooled(counts, center, degrees.unsqueeze(1) * spread)
    return _like(pooled.mean, mean), _like(pooled.variance(unbiased=unbiased), variance)


def _wide(value: Tensor) -> Tensor:
    """(C,) real or complex -> (C,) or (2C,) float64 on the CPU."""
    return (torch.view_as_real(value).flatten() if value.is_complex() else value).to("cpu", torch.float64)


def _like(value: Tensor, of: Tensor) -> Tensor:
    value = torch.view_as_complex(value.unflatten(0, (-1, 2))) if of.is_complex() else value
    return value.to(device=of.device, dtype=of.dtype)
