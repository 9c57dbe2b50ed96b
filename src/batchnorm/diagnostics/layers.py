"""The numbers of every layer: what it is, and what was measured, for tables, files and pages."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.norms import Norm
from batchnorm.diagnostics.record import LayerRecord, divergence, in_inference, input_of
from batchnorm.diagnostics.rules.batches import effective_samples
from batchnorm.diagnostics.rules.running import drifts
from batchnorm.functional import moments
from batchnorm.moments import Moments

_BATCHES_IN_INFERENCE = 4  # what inference makes of a layer's input is a picture, not a rule
_QUANTILES = 5  # channels shown of a layer, from the smallest to the largest divergence


def layer_rows(case: Case, *, measured: bool) -> dict[str, dict[str, Any]]:
    """By layer: kind, class, channels, batches counted, eps and momentum; if measured, also the numbers of its inputs."""
    rows = {norm.name: _configured(norm) for norm in case.norms}
    if not measured:
        return rows
    drift, inference = drifts(case.record), _moments_in_inference(case)
    gradients = case.gradients.outputs if "gradients" in vars(case) else {}  # measured if a rule asked for them
    for norm in case.norms:
        layer, found = case.record.layers.get(norm.name), drift.get(norm.name)
        rows[norm.name] |= {
            "order": None if layer is None else layer.order,
            "drift": None if found is None else found.nats,
            "log_ratio_of_deviations": None if found is None else found.log_ratio,
            "drift_in_inference": _nats(norm, inference.get(norm.name)),
            "effective_samples": None if layer is None else effective_samples(layer),
            "gradient": gradients.get(norm.name),
            "quantiles": [] if layer is None else _quantiles(layer.by_domain().get(None, layer)),
        }
    return rows


def _configured(norm: Norm) -> dict[str, Any]:
    pair = norm.statistics()
    return {
        "kind": norm.kind,
        "class": type(norm.module).__name__,
        "channels": None if pair is None else pair[0].numel(),
        "batches": norm.batches,
        "eps": norm.eps,
        "momentum": norm.momentum,
    }


def _moments_in_inference(case: Case) -> dict[str, Moments]:
    """The moments of the layers' inputs in inference mode; none if the model cannot be called so, as some that return a loss."""
    found = dict[str, Moments]()

    def before(norm: Norm) -> Any:
        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, mask = input_of(norm, args, kwargs), kwargs.get("mask")
            if x is None or x.numel() == 0 or norm.domain is not None:  # the numbers are those of the first domain
                return
            batch = moments(x, mask if isinstance(mask, Tensor) else None)
            here = Moments(int(batch.count), batch.mean.double(), batch.m2.double())
            found[norm.name] = found[norm.name].merge(here) if norm.name in found else here

        return hook

    with case.untouched(), in_inference(case.inside), torch.no_grad(), contextlib.ExitStack() as stack:
        for norm in case.norms:
            stack.callback(norm.module.register_forward_pre_hook(before(norm), with_kwargs=True).remove)
        try:
            for item in case.items[:_BATCHES_IN_INFERENCE]:
                case.call(item)
        except Exception:
            return {}
    return found


def _nats(norm: Norm, pool: Moments | None) -> float | None:
    """Divergence of the moments of its input from the running statistics, mean over channels."""
    found = None if pool is None else _divergences(norm, pool)
    return None if found is None else found.mean().item()


def _divergences(norm: Norm, pool: Moments) -> Tensor | None:
    """By channel, (C,); None if a statistic is missing or not finite."""
    pair = norm.statistics()
    if pair is None or pair[0].shape != pool.mean.shape or bool((pair[1] < 0).any()):
        return None
    found = divergence(pool.mean, pool.variance(), *pair, norm.eps or 1e-5)
    return found if bool(found.isfinite().all()) else None


def _quantiles(layer: LayerRecord) -> list[dict[str, float]]:
    """Channels from the smallest to the largest divergence of the batches from the running statistics, with both distributions."""
    found = None if layer.pool is None else _divergences(layer.norm, layer.pool)
    pair = layer.norm.statistics()
    if found is None or pair is None or layer.pool is None:
        return []
    names = ("mean", "deviation", "running_mean", "running_deviation")
    values = torch.stack(
        [layer.pool.mean, layer.pool.variance().sqrt(), pair[0], (pair[1] + (layer.norm.eps or 1e-5)).sqrt()]
    )  # (4, C)
    order = found.argsort()
    channels = order[torch.linspace(0, len(order) - 1, min(_QUANTILES, len(order))).round().long()]
    return [
        {"channel": channel} | {name: float(f"{value:.6g}") for name, value in zip(names, numbers, strict=True)}
        for channel, numbers in zip(channels.tolist(), values[:, channels].T.tolist(), strict=True)
    ]
