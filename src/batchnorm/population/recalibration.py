"""Population statistics: mean and variance over a whole data set, for inference (Ioffe & Szegedy 2015, section 3.1, Algorithm 2).

Running statistics are a moving average over the last batches. `recalibrate` replaces them by the moments of all inputs of a layer over a
data set, pooled in float64. The variance includes the differences between the means of the batches. A mean of the batches' variances (the
paper's E[var_B], `torch.optim.swa_utils.update_bn`) misses these, which matters for sorted data.

The input of a layer depends on how earlier layers normalize:

- joint: they normalize each batch by its own statistics, as in training and in Algorithm 2. This takes one pass.
- layerwise: they normalize by their population statistics, as in inference. A layer is final after the first pass in which all its
  inputs come from final layers. This takes as many passes as the longest chain of batch norms has layers.

All other modules run as in inference, for example without dropout.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer

from batchnorm.distributed import Replicas
from batchnorm.errors import InputError, StateError
from batchnorm.functional import is_single_value, mask_of, moments
from batchnorm.functional.compiled import eager
from batchnorm.functional.components import components_as_channels, components_of_buffer
from batchnorm.layers import BatchNorm
from batchnorm.logs import logger
from batchnorm.moments import SEVERAL, Moments
from batchnorm.population.items import Forward, call, check_loader
from batchnorm.population.lineage import Lineage
from batchnorm.statistics.contract import in_domain, is_frozen
from batchnorm.surgery import batch_norms, walk
from batchnorm.surgery.by_hand import hand_written, why_left_by_hand
from batchnorm.surgery.observe import Observer, observed
from batchnorm.surgery.transaction import transaction

METHODS = ("joint", "layerwise")


@dataclass(frozen=True)
class Progress:
    """How far a recalibration is.

    Attributes:
        number: number of the pass, from 1.
        batches: number of batches read in this pass, in this process.
        final: number of layers that have their population statistics.
        layers: number of layers to recalibrate.
    """

    number: int
    batches: int
    final: int
    layers: int


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    method: str = "joint",
    process_group: dist.ProcessGroup | None = None,
    limit: int | None = None,
) -> nn.Module:
    """Give every batch norm of a model the population statistics of a data set, in place, and return the model.

    Mean and variance of each channel become those of all inputs of the layer, pooled exactly in float64 over batches, ranks and the
    calls of a layer that is called several times; masked values do not count, and sample weights count as in training. The layer's
    `running_variance` says whether the variance is unbiased, as in torch's layers. It works for torch's layers and ours. It does
    not change frozen layers (`bn.freeze`, or in inference mode while the model is in training mode), layers without running
    statistics, and layers that are not called.

    In layers with `Domains` it changes the statistics of the current domain, `with bn.domain(...)`.

    If it ends early, by an error of the loader or the model or by Ctrl-C, buffers, modes and hooks are exactly as before.
    `num_batches_tracked` does not change, except if momentum is None: then it becomes the number of batches.

    Args:
        model: changed in place; its modes are restored.
        loader: yields batches: a tensor, a tuple or list whose first element is the input, a dict of keyword arguments, or anything
            that your `forward` accepts. For several passes it must not be an iterator, which can be read only once.
        forward: called as `forward(model, item)`.
        method: "joint" normalizes as in training, in one pass. "layerwise" normalizes as in inference, in as many passes as the longest
            chain of batch norms has layers, so each layer gets the statistics of exactly its inputs in inference. If the input of a
            layer depends on its own output, its calls are pooled, each normalized by its batch. With "joint", a batch of one value per
            channel has no variance and is normalized by the running statistics; "layerwise" is exact for any batch size.
        process_group: each rank reads its own batches, of any number, and all get the same statistics. None is all ranks if
            torch.distributed is initialized; pass a group of this rank alone to exclude the others. In a synchronized model, "joint"
            needs the same number of batches on every rank.
        limit: maximum number of batches to read in each pass.

    Raises:
        ArgumentError: if an argument is of the wrong kind, or a loader that must be read several times is an iterator.
        InputError: on an unknown method or a limit below 1; if the loader yields nothing; if a layer gets one value per channel in all;
            on NaN or Inf, by a layer's `on_nonfinite`: "skip" leaves the batch out, "error" (and torch's layers) raises.
        StateError: if a lazy layer has not had its first input.
        ReplicaError: if another rank failed or did not answer.
    """
    options: dict[str, Any] = {"forward": forward, "method": method, "process_group": process_group, "limit": limit}
    with contextlib.closing(recalibrating(model, loader, **options)) as steps:
        for _ in steps:
            pass
    return model


def recalibrating(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Forward | None = None,
    method: str = "joint",
    process_group: dist.ProcessGroup | None = None,
    limit: int | None = None,
) -> Generator[Progress, None, None]:
    """`recalibrate` as a generator that yields the progress after each batch and pass. If closed early, it restores the model.

    Raises:
        As `recalibrate`.
    """
    recorders = _recorders(model)
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, but got {method!r}")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InputError(f"limit must be a number of batches, at least 1, or None for all, but got {limit!r}")
    check_loader(loader, several_passes=method == "layerwise")
    ranks = _ranks(process_group)
    if not recorders:
        by_hand = "".join(
            f"; {name} left: {why_left_by_hand(layer)}" for name, layer in hand_written(walk(model)).items()
        )
        logger.warning("recalibrate: the model has no batch norm to recalibrate%s", by_hand)
    return _run(model, recorders, _Batches(loader, limit), forward or call, method == "layerwise", ranks)


def recalibrate_alone(model: nn.Module, items: list[Any], forward: Forward) -> None:
    """`recalibrate` in one pass over the items of this process, also where there are several processes."""
    for _ in _run(model, _recorders(model), items, forward, False, None):
        pass


@dataclass(frozen=True)
class _Batches:
    """The first `limit` items of a loader; can be iterated as often as the loader."""

    loader: Iterable[Any]
    limit: int | None

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.limit)


class _Recorder:
    """Pools the inputs of one layer in a pass, and writes its statistics."""

    def __init__(self, name: str, layer: _BatchNorm, bit: int) -> None:
        self.name, self.layer, self.bit = name, layer, bit
        self.target: Any = in_domain(layer)  # its buffers are written
        self.final = False
        self.forced = False  # whether to record although its input depends on its own output
        self.begin_pass()

    def begin_pass(self) -> None:
        self.moments: Moments | None = None
        self.order = math.inf  # position of its first call among the calls of all layers
        self.calls = self.skipped = 0
        self.waits = False  # whether an input came from a layer that is not final

    def record(self, x: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
        """Pool one call's input (N, C, *S)."""
        if x.is_complex():
            x = components_as_channels(x)
        batch = moments(x, mask, weights=weights)
        policy = getattr(self.layer, "on_nonfinite", "error")
        if policy != "propagate" and not bool((batch.mean.isfinite() & batch.m2.isfinite()).all()):
            if policy == "error":
                raise InputError(
                    f"{self.name}: the statistics of a batch must be finite, but its input holds NaN or Inf, or values too large; "
                    'find the batch, or convert the model (batchnorm.convert) and use on_nonfinite="skip" to leave it out'
                )
            self.skipped += 1
            return
        self.calls += 1
        self.moments = batch if self.moments is None else self.moments.merge(batch)

    def no_moments(self) -> Moments:
        mean = self.target.running_mean
        values = (components_of_buffer(mean) if mean.is_complex() else mean).new_zeros(1, dtype=torch.float64)
        C = mean.numel() * (2 if mean.is_complex() else 1)
        return Moments(0, values.expand(C), values.expand(C))

    def write(self, pooled: Moments, calls: int, skipped: int) -> None:
        """Write pooled moments into the running statistics of the layer."""
        layer, count = self.target, float(pooled.count)
        if 0 < count <= SEVERAL:
            raise InputError(
                f"{self.name}: population statistics need at least two values per channel, since one has no variance, but got "
                f"{count:g}; give the loader more data, or scale its weights"
            )
        if count == 0:
            logger.warning("recalibrate: left %s: it got no values", self.name)
            return
        variance = pooled.variance(unbiased=getattr(self.layer, "running_variance", "unbiased") == "unbiased")
        for buffer, value in ((layer.running_mean, pooled.mean), (layer.running_var, variance)):
            (components_of_buffer(buffer) if buffer.is_complex() else buffer).copy_(value)
        if layer.momentum is None and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(calls)
        counter = getattr(self.layer, "num_nonfinite_batches", None)
        if counter is not None:
            counter.add_(skipped)
        if skipped:
            logger.warning("recalibrate: %s: left out %d batches that were not finite", self.name, skipped)
        logger.info("recalibrate: %s has the statistics of %.15g values", self.name, count)


def _recorders(model: nn.Module) -> list[_Recorder]:
    """A recorder for each layer to recalibrate."""
    recorders = list[_Recorder]()
    for name, layer in batch_norms(model).items():
        reason = _why_left(layer, model)
        if reason:
            logger.info("recalibrate: left %s: %s", name, reason)
            continue
        if isinstance(layer.running_mean, UninitializedBuffer):
            raise StateError(
                f"{name}: a lazy layer must have had its first input before it is recalibrated; call the model once"
            )
        recorders.append(_Recorder(name, layer, 1 << len(recorders)))
    return recorders


def _why_left(layer: _BatchNorm, model: nn.Module) -> str | None:
    if layer.running_mean is None or layer.running_var is None or not layer.track_running_stats:
        return "it has no running statistics"
    if is_frozen(layer):
        return "it is frozen"
    return "it is in inference mode, the model in training mode" if model.training and not layer.training else None


def _ranks(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group over which to merge; None if this process is the only one."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return None
    replicas = Replicas("recalibrate", group)
    return replicas._process_group if replicas.size > 1 else None


def _run(
    model: nn.Module,
    recorders: list[_Recorder],
    loader: Iterable[Any],
    forward: Forward,
    layerwise: bool,
    group: dist.ProcessGroup | None,
) -> Generator[Progress, None, None]:
    if not recorders:
        return
    lineage = Lineage() if layerwise else None
    done = Progress(0, 0, 0, len(recorders))
    observers = _observers(recorders, lineage)
    # Without `track_running_stats` neither torch's layers nor ours update their buffers in training mode.
    with transaction(model, values=True), observed(model, observers, training=False, track_running_stats=False):
        for number in itertools.count(1):
            batches = 0
            for one in recorders:
                one.begin_pass()
            for item in loader:
                with torch.no_grad(), eager(), _fresh(lineage):
                    forward(model, item)
                batches += 1
                yield Progress(number, batches, sum(one.final for one in recorders), len(recorders))
            _settle(recorders, batches, group)
            final = sum(one.final for one in recorders)
            logger.info("recalibrate: pass %d: %d of %d layers are final", number, final, len(recorders))
            done = Progress(number, batches, final, len(recorders))
            if final == len(recorders):
                break
            yield done
    yield done  # modes and hooks are restored, statistics are final: it is safe to stop here


def _fresh(lineage: Lineage | None) -> contextlib.AbstractContextManager[Any]:
    if lineage is None:
        return contextlib.nullcontext()
    lineage.clear()
    return lineage


def _observers(recorders: list[_Recorder], lineage: Lineage | None) -> list[Observer]:
    """Hooks that record the inputs of layers."""
    order = itertools.count()
    return [
        Observer(one.layer, _before(one, recorders, lineage, order), None if lineage is None else _after(one, lineage))
        for one in recorders
    ]


def _before(one: _Recorder, recorders: list[_Recorder], lineage: Lineage | None, order: Iterator[int]) -> Any:
    def hook(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.training = False
        if one.final:
            return
        one.order = min(one.order, next(order))
        x, mask, weights = _input(layer, args, kwargs)
        if lineage is not None:
            pending = sum(other.bit for other in recorders if not other.final)
            one.waits |= bool(lineage.of((args, kwargs)) & pending)
        shared = getattr(layer, "reducer", None)  # merges with other ranks, which must call it equally often
        if shared is None or lineage is None or one.forced:
            layer.training = not is_single_value(x) or (shared is not None and shared.size > 1)
        if one.forced or not one.waits:
            one.record(x, mask, weights)

    return hook


def _after(one: _Recorder, lineage: Lineage) -> Any:
    def hook(layer: _BatchNorm, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001 (torch's)
        if not one.final:
            lineage.mark(output, one.bit | lineage.of((args, kwargs)))

    return hook


def _input(
    layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The input of a call, as (N, C, *S), its mask and its sample weights."""
    x = args[0] if args else kwargs["input"]
    if not isinstance(layer, BatchNorm):
        return x, None, None
    mask = args[2] if len(args) > 2 else kwargs.get("mask")
    lengths = args[3] if len(args) > 3 else kwargs.get("lengths")
    x = x.movedim(layer._axis(x), 1)
    return x, mask_of(lengths, mask, x), kwargs.get("weights")


@torch.no_grad()
def _settle(recorders: list[_Recorder], batches: int, group: dist.ProcessGroup | None) -> None:
    """Finish a pass: write the statistics of layers whose inputs all came from final layers, the same layers on all ranks.

    Raises:
        InputError: if no rank had a batch.
    """
    pending = [one for one in recorders if not one.final]
    rows = [[float(batches)], *([one.order, one.waits, one.calls, one.skipped] for one in pending)]
    everywhere = _everywhere([value for row in rows for value in row], pending, group)  # (W, 1 + 4 · layers)
    if not everywhere[:, 0].any():
        raise InputError("the loader must yield at least one batch, but it is empty; the model did not change")
    of_layers = everywhere[:, 1:].unflatten(1, (len(pending), 4))
    first = of_layers[:, :, 0].amin(0).tolist()
    waits = of_layers[:, :, 1].any(0).tolist()
    calls, skipped = (of_layers[:, :, i].sum(0).long().tolist() for i in (2, 3))
    ready = [i for i, one in enumerate(pending) if one.forced or not waits[i]]
    if not ready:  # each depends on its own output or on such a layer: record the one that is called first
        pending[min(range(len(pending)), key=first.__getitem__)].forced = True
        return
    names = tuple(one.name for one in recorders)
    for i in ready:
        one = pending[i]
        pooled = one.no_moments() if one.moments is None else one.moments
        if group is not None:
            pooled = Replicas(one.name, group, names).merge(pooled)
        one.write(pooled, calls[i], skipped[i])
        one.final = True


def _everywhere(values: list[float], pending: list[_Recorder], group: dist.ProcessGroup | None) -> Tensor:
    """Exchange (K,) numbers of each rank; returns (W, K) on the CPU."""
    row = torch.tensor(values, dtype=torch.float64)
    if group is None:
        return row.unsqueeze(0)
    device = pending[0].layer.running_mean.device if pending else row.device  # pyright: ignore[reportOptionalMemberAccess]
    return Replicas("recalibrate", group).exchange(row.to(device)).cpu()
