"""Running statistics from the data, for every kind of layer, and one set of them for all replicas."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn

from batchnorm.diagnostics.case import Case
from batchnorm.diagnostics.norms import Norm, norms_of
from batchnorm.moments import Moments
from batchnorm.population import recalibrate
from batchnorm.surgery.averages import without_wrappers


def recalibrate_all(case: Case, also: Sequence[str] = ()) -> None:
    """Recalibrate the layers that learn statistics, hand-written ones too, and frozen ones that are named."""
    by_hand = [norm.name for norm in case.norms if norm.kind == "hand-written" and norm.updates]
    held = [name for name in also if name not in case.learning]
    case.give_pools([*by_hand, *held])  # first: what comes behind held layers depends on their statistics
    if any(norm.kind in ("torch", "ours") and norm.updates for norm in case.norms):
        method = "layerwise" if case.drops else "joint"
        recalibrate(case.inside, case.items, forward=lambda _, item: case.call(item), method=method)
    in_domains = [name for name, layer in case.record.layers.items() if layer.by_domain().keys() - {None}]
    case.give_pools(in_domains)


def pool_replicas(models: Sequence[nn.Module]) -> None:
    """Give the layers of one name in all models the mean of their means, and the variance within and between models."""
    named = [{without_wrappers(norm.name): norm for norm in norms_of(model)} for model in models]
    for name in named[0]:
        layers = [layers[name] for layers in named if name in layers]
        moments = [found for layer in layers if (found := _moments(layer)) is not None]
        if len(moments) == len(layers):
            pool = functools.reduce(Moments.merge, moments)
            for layer in layers:
                layer.set_statistics(pool.mean, pool.variance())


def _moments(norm: Norm) -> Moments | None:
    """Running statistics as moments, so that replicas have the same weight."""
    pair = norm.statistics()
    return None if pair is None else Moments(1, pair[0], pair[1])
