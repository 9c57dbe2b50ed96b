"""Population statistics: those of a whole data set, for inference (Ioffe & Szegedy 2015, section 3.1 and Algorithm 2).

The running statistics are a moving average of the last batches; `recalibrate` replaces them by the moments of all values that a layer
sees over a data set, pooled in float64. The variance holds what lies between the batches too, which a mean of the batches' variances
(the paper's E[var_B], `torch.optim.swa_utils.update_bn`) leaves out: sorted data have batches with little variance far apart.

A layer's input depends on how the layers below it normalize:

- joint: as in training, each batch by its own statistics, as in Algorithm 2; one pass.
- layerwise: as in inference, by statistics that are population statistics already; a layer is final after the first pass in which
  nothing it was fed came out of a layer that is not. As many passes as batch norms stand one behind the other.

All other modules run as in inference: statistics for inference without dropout are those of data without dropout.
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
from batchnorm.functional import is_single_value, moments
from batchnorm.functional.compiled import eager
from batchnorm.functional.components import components_as_channels, components_of_buffer
from batchnorm.layers import BatchNorm
from batchnorm.logs import logger
from batchnorm.moments import Moments
from batchnorm.population.items import Forward, call, check_loader
from batchnorm.population.lineage import Lineage
from batchnorm.statistics import Domains, Running
from batchnorm.surgery import batch_norms
from batchnorm.surgery.transaction import transaction

METHODS = ("joint", "layerwise")


@dataclass(frozen=True)
class Progress:
    """How far a recalibration is.

    Attributes:
        number: of the pass, from 1.
        batches: read in this pass, in this process.
        final: layers that have their population statistics.
        layers: how many there are to recalibrate.
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

    Each channel's mean and variance become those of all values the layer sees, pooled exactly in float64 over batches, calls (of a
    layer that is used several times) and ranks; masked values do not count. The variance is the layer's `running_variance`, unbiased
    for torch's layers. Layers of torch and ours alike. Left alone are frozen layers (`bn.freeze`; or in inference while the model
    is in training), layers without running statistics, and layers that are not called.

    Layers with `Domains` get those of the domain that the call stands in, `with bn.domain(...)`.

    Whatever ends it early, an error of the loader or of the model or Ctrl-C, leaves buffers, modes and hooks exactly as they were.
    `num_batches_tracked` stays, except where momentum is None and it is the weight of what was learned: there it counts the batches.

    Args:
        model: changed in place; its modes are put back.
        loader: yields batches: a tensor, a tuple or list whose first element is the input, a dict of keyword arguments, or anything
            with a `forward` of your own. Several passes want one that can be read again, not an iterator.
        forward: called as `forward(model, item)`.
        method: "joint" normalizes as in training, in one pass; "layerwise" as in inference, in as many passes as batch norms stand
            one behind the other, so that each layer gets the statistics of exactly what it is fed in inference. A layer that feeds
            itself has its calls pooled, normalized by the batch. With "joint", a batch of one value per channel is normalized by the
            running statistics, since it has no variance; "layerwise" is exact for any size of batch.
        process_group: each rank brings its own batches, as many as it has, and all get the same statistics. None is all ranks if
            torch.distributed is initialized; pass a group of this rank alone to leave out the others. In a synchronized model
            "joint" wants as many batches on every rank.
        limit: batches to read in each pass, at most.

    Raises:
        ArgumentError: if an argument is of the wrong kind, or a loader that has to be read again is an iterator.
        InputError: on an unknown method or a limit below 1; if the loader yields nothing; if a layer sees one value per channel in all;
            on NaN or Inf, by a layer's `on_nonfinite`: "skip" leaves the batch out, "error" (and torch's layers) raises.
        StateError: if a lazy layer has not seen its first input.
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
    """`recalibrate`, batch by batch: yields its progress after each batch and each pass. Closed early, the model is as it was.

    Raises:
        As `recalibrate`.
    """
    watched = _watched(model)
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, but got {method!r}")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise InputError(f"limit must be a number of batches, at least 1, or None for all, but got {limit!r}")
    check_loader(loader, several_passes=method == "layerwise")
    ranks = _ranks(process_group)
    if not watched:
        logger.warning("recalibrate: the model has no batch norm to recalibrate")
    return _run(model, watched, _Batches(loader, limit), forward or call, method == "layerwise", ranks)


@dataclass(frozen=True)
class _Batches:
    """The loader, up to the limit; can be read as often as the loader can."""

    loader: Iterable[Any]
    limit: int | None

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.limit)


class _Watched:
    """A layer, and what it saw in this pass."""

    def __init__(self, name: str, layer: _BatchNorm, bit: int) -> None:
        self.name, self.layer, self.bit = name, layer, bit
        self.kept: Any = layer  # whose buffers are written
        if isinstance(layer, BatchNorm) and isinstance(layer.statistics, Domains):
            self.kept = layer.statistics.in_domain(layer)
        self.final = False
        self.forced = False  # it waits for itself: take what it sees now
        self.begin_pass()

    def begin_pass(self) -> None:
        self.moments: Moments | None = None
        self.order = math.inf  # of its first call among those of all layers
        self.calls = self.skipped = 0
        self.waits = False  # whether it was fed from a layer that is not final

    def see(self, x: Tensor, mask: Tensor | None) -> None:
        """Pool one call's input (N, C, *S)."""
        if x.is_complex():
            x = components_as_channels(x)
        batch = moments(x, mask)
        policy = getattr(self.layer, "on_nonfinite", "error")
        if policy != "propagate" and not bool((batch.mean.isfinite() & batch.m2.isfinite()).all()):
            if policy == "error":
                raise InputError(
                    f"{self.name}: the statistics of a batch must be finite, but its input holds NaN or Inf, or values too large; "
                    'find the batch, or convert the model (batchnorm.convert) and use on_nonfinite="skip" to pass over it'
                )
            self.skipped += 1
            return
        self.calls += 1
        self.moments = batch if self.moments is None else self.moments.merge(batch)

    def nothing(self) -> Moments:
        mean = self.kept.running_mean
        values = (components_of_buffer(mean) if mean.is_complex() else mean).new_zeros(1, dtype=torch.float64)
        C = mean.numel() * (2 if mean.is_complex() else 1)
        return Moments(0, values.expand(C), values.expand(C))

    def write(self, pooled: Moments, calls: int, skipped: int) -> None:
        """Make pooled moments the layer's running statistics."""
        layer, count = self.kept, int(pooled.count)
        if count == 1:
            raise InputError(
                f"{self.name}: population statistics need at least two values per channel, since one has no variance, but got 1; "
                "give the loader more data"
            )
        if count == 0:
            logger.warning("recalibrate: left %s: it saw no values", self.name)
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
        logger.info("recalibrate: %s has the statistics of %d values", self.name, count)


def _watched(model: nn.Module) -> list[_Watched]:
    """The layers to recalibrate."""
    watched = list[_Watched]()
    for name, layer in batch_norms(model).items():
        reason = _left(layer, model)
        if reason:
            logger.info("recalibrate: left %s: %s", name, reason)
            continue
        if isinstance(layer.running_mean, UninitializedBuffer):
            raise StateError(
                f"{name}: a lazy layer must have seen its first input before it is recalibrated; call the model once"
            )
        watched.append(_Watched(name, layer, 1 << len(watched)))
    return watched


def _left(layer: _BatchNorm, model: nn.Module) -> str | None:
    if layer.running_mean is None or layer.running_var is None or not layer.track_running_stats:
        return "it has no running statistics"
    if isinstance(getattr(layer, "statistics", None), Running):
        return "it is frozen"
    return "it is in inference while the model is in training" if model.training and not layer.training else None


def _ranks(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group over which to merge; None where there is nobody else."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return None
    replicas = Replicas("recalibrate", group)
    return replicas._process_group if replicas.size > 1 else None


def _run(
    model: nn.Module,
    watched: list[_Watched],
    loader: Iterable[Any],
    forward: Forward,
    layerwise: bool,
    group: dist.ProcessGroup | None,
) -> Generator[Progress, None, None]:
    if not watched:
        return
    lineage = Lineage() if layerwise else None
    done = Progress(0, 0, 0, len(watched))
    with transaction(model, values=True), _observed(model, watched, lineage):
        for number in itertools.count(1):
            batches = 0
            for one in watched:
                one.begin_pass()
            for item in loader:
                with torch.no_grad(), eager(), _fresh(lineage):
                    forward(model, item)
                batches += 1
                yield Progress(number, batches, sum(one.final for one in watched), len(watched))
            _settle(watched, batches, group)
            final = sum(one.final for one in watched)
            logger.info("recalibrate: pass %d: %d of %d layers are final", number, final, len(watched))
            done = Progress(number, batches, final, len(watched))
            if final == len(watched):
                break
            yield done
    yield done  # modes and hooks are back: whoever stops here has the new statistics


def _fresh(lineage: Lineage | None) -> contextlib.AbstractContextManager[Any]:
    if lineage is None:
        return contextlib.nullcontext()
    lineage.forget()
    return lineage


@contextlib.contextmanager
def _observed(model: nn.Module, watched: list[_Watched], lineage: Lineage | None) -> Iterator[None]:
    """Everything as in inference but the layers that are not final; hooks that see what they are fed. All is put back at the end.

    Layers run with `track_running_stats` off, which is how torch's and ours leave their buffers alone in training mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    tracking = [(one.layer, one.layer.track_running_stats) for one in watched]
    handles = list[Any]()
    order = itertools.count()
    try:
        for module, _ in modes:
            module.training = False  # not .eval(), which some modules override to do more
        for one in watched:
            one.layer.track_running_stats = False
            handles.append(one.layer.register_forward_pre_hook(_before(one, watched, lineage, order), with_kwargs=True))
            if lineage is not None:
                handles.append(one.layer.register_forward_hook(_after(one, lineage), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, tracks in tracking:
            layer.track_running_stats = tracks
        for module, training in modes:
            module.training = training


def _before(one: _Watched, watched: list[_Watched], lineage: Lineage | None, order: Iterator[int]) -> Any:
    def hook(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.training = False
        if one.final:
            return
        one.order = min(one.order, next(order))
        x, mask = _fed(layer, args, kwargs)
        if lineage is not None:
            pending = sum(other.bit for other in watched if not other.final)
            one.waits |= bool(lineage.of((args, kwargs)) & pending)
        shared = getattr(layer, "reducer", None)  # merges with other ranks, which must call it as often
        if shared is None or lineage is None or one.forced:
            layer.training = not is_single_value(x) or (shared is not None and shared.size > 1)
        if one.forced or not one.waits:
            one.see(x, mask)

    return hook


def _after(one: _Watched, lineage: Lineage) -> Any:
    def hook(layer: _BatchNorm, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001 (torch's)
        if not one.final:
            lineage.mark(output, one.bit | lineage.of((args, kwargs)))

    return hook


def _fed(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a layer is called with, as (N, C, *S), and its mask."""
    x = args[0] if args else kwargs["input"]
    if not isinstance(layer, BatchNorm):
        return x, None
    mask = args[2] if len(args) > 2 else kwargs.get("mask")
    return x.movedim(layer._axis(x), 1), mask


@torch.no_grad()
def _settle(watched: list[_Watched], batches: int, group: dist.ProcessGroup | None) -> None:
    """After a pass: the layers that were fed from final ones only are final, on all ranks alike.

    Raises:
        InputError: if no rank had a batch.
    """
    pending = [one for one in watched if not one.final]
    rows = [[float(batches)], *([one.order, one.waits, one.calls, one.skipped] for one in pending)]
    everywhere = _everywhere([value for row in rows for value in row], pending, group)  # (W, 1 + 4 · layers)
    if not everywhere[:, 0].any():
        raise InputError("the loader must yield at least one batch, but it is empty; the model is as it was")
    of_layers = everywhere[:, 1:].unflatten(1, (len(pending), 4))
    first = of_layers[:, :, 0].amin(0).tolist()
    waits = of_layers[:, :, 1].any(0).tolist()
    calls, skipped = (of_layers[:, :, i].sum(0).long().tolist() for i in (2, 3))
    ready = [i for i, one in enumerate(pending) if one.forced or not waits[i]]
    if not ready:  # each waits for itself or for another that does: the one that is called first goes on
        pending[min(range(len(pending)), key=first.__getitem__)].forced = True
        return
    names = tuple(one.name for one in watched)
    for i in ready:
        one = pending[i]
        pooled = one.nothing() if one.moments is None else one.moments
        if group is not None:
            pooled = Replicas(one.name, group, names).merge(pooled)
        one.write(pooled, calls[i], skipped[i])
        one.final = True


def _everywhere(values: list[float], pending: list[_Watched], group: dist.ProcessGroup | None) -> Tensor:
    """(K,) of this rank -> (W, K) of all, on the CPU."""
    row = torch.tensor(values, dtype=torch.float64)
    if group is None:
        return row.unsqueeze(0)
    device = pending[0].layer.running_mean.device if pending else row.device  # pyright: ignore[reportOptionalMemberAccess]
    return Replicas("recalibrate", group).exchange(row.to(device)).cpu()
