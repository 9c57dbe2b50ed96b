"""Batch statistics over the replicas of a process group: any c10d backend, CPU and GPU, one collective per layer and direction.

Each replica sends one row of float64: (tag, count, mean (C,), M2 (C,)) in the forward, (tag, count, Σg (C,), Σg·x̂ (C,)) in the backward.
It writes the row into a table with a row per replica that is zero elsewhere, and one all_reduce adds the tables. x + 0 is exact, so every
replica gets every row, whatever the order in which the backend adds. All replicas merge the rows in the order of the ranks and get the same
bits. The table has (2C + 2) · W numbers of 8 bytes for each layer. One row of sums would be smaller, but Σx² cancels if the mean is large.

The tag identifies layer and direction, to detect replicas that call different layers. On the CPU, such a mismatch raises at once. On other
devices, where a check would wait for the device, a mismatch makes the statistics NaN. Gloo ends the process (`std::terminate`) if tables of
replicas differ in size, so on the CPU every layer pads its row to the length of the longest.
"""

from __future__ import annotations

import time
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ReplicaError, StateError
from batchnorm.layers import BatchNorm
from batchnorm.logs import logger
from batchnorm.moments import Moments
from batchnorm.surgery import batch_norms, walk
from batchnorm.surgery.exchange import convert_layers
from batchnorm.surgery.report import Report
from batchnorm.surgery.transaction import transactional
from batchnorm.surgery.walker import slots_of
from batchnorm.torch_state import differentiated_by_torch, is_legacy_batched, unseen_by_checkpoints

GRACE = 2.0  # seconds to wait, after a failure, for other ranks to report that they failed too
_FORWARD, _BACKWARD = 0, 1


class Replicas:
    """The reducer of one layer: merges its statistics over the ranks of a process group.

    Args:
        layer: the name of the layer, for errors; the same on every replica.
        group: a process group this process belongs to; None is the default group.
        names: the names of all synchronized layers, for errors that name the layers of other replicas.
        width: minimum length of a row without its tag; on the CPU shorter rows are padded.

    Raises:
        StateError: if torch.distributed is not initialized, or this process is not in the group.
    """

    def __init__(
        self, layer: str, group: dist.ProcessGroup | None = None, names: tuple[str, ...] = (), width: int = 0
    ) -> None:
        self.layer, self.names, self.width = layer, names or (layer,), width
        self.tag = _tag(layer)
        self._connect(process_group_of(group), group is None)

    def _connect(self, group: dist.ProcessGroup, is_default: bool) -> None:
        self._process_group = group
        self.group_name, self._is_default = group.group_name, is_default
        self._size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.ranks = tuple(dist.get_process_group_ranks(group))

    @property
    def size(self) -> int:
        """Number of replicas."""
        return self._size

    def merge(self, moments: Moments) -> Moments:
        """The moments of all replicas together; differentiable.

        Raises:
            ReplicaError: if a replica did not answer within the group's timeout, or was in another layer.
        """
        return Moments.pooled_rows(_exchanged(moments.row(), self, _FORWARD))

    def sum(self, sum_grad: Tensor, sum_grad_xhat: Tensor) -> tuple[Tensor, Tensor]:
        """Σg and Σg·x̂ of all replicas together, added in the order of the ranks.

        Raises:
            ReplicaError: as `merge`.
        """
        rows = _exchanged(torch.cat([sum_grad.new_zeros(1), sum_grad, sum_grad_xhat]), self, _BACKWARD)
        C = sum_grad.shape[0]
        total = rows.sum(0)
        return total[1 : C + 1], total[C + 1 :]

    def exchange(self, values: Tensor, direction: int = _FORWARD) -> Tensor:
        """The values of all replicas: (K,) float64 -> (W, K), in the order of the ranks; one all_reduce.

        A recomputation exchanges them again, also in a checkpoint that stores results of collectives: other replicas wait for it.
        """
        with unseen_by_checkpoints():
            return self._exchange(values, direction)

    def _exchange(self, values: Tensor, direction: int) -> Tensor:
        tag = self.tag + direction / 2
        K = values.shape[0]
        row = torch.cat([values.new_full((1,), tag), values])
        if values.is_cpu and self.width > K:
            row = F.pad(row, (0, self.width - K))
        place = torch.arange(self._size, device=values.device).eq(self.rank).unsqueeze(1)
        table = self.all_reduce(torch.where(place, row, 0.0))  # (W, 1 + K or more)
        tags, rows = table[:, 0], table[:, 1 : 1 + K]
        if torch.compiler.is_compiling() or not rows.is_cpu or rows.is_meta:
            return torch.where(tags.eq(tag).all(), rows, torch.nan)
        if not bool(tags.eq(tag).all()):
            raise ReplicaError(self._mismatch(tags.tolist(), direction))
        return rows

    def all_reduce(self, table: Tensor) -> Tensor:
        """The sum of the tables of all replicas; in place in eager code."""
        if self._size == 0:
            raise StateError(
                f"{self.layer}: its process group must exist in this process, but the layer was loaded without it; "
                "call batchnorm.synchronize again, or batchnorm.unsynchronize for a single process"
            )
        if torch.compiler.is_compiling():
            total = torch.ops._c10d_functional.all_reduce.default(table, "sum", self.group_name)
            return torch.ops._c10d_functional.wait_tensor.default(total)
        try:
            dist.all_reduce(table, group=self._process_group)
        except (RuntimeError, ValueError) as error:
            if is_legacy_batched(table):
                raise StateError(
                    f"{self.layer}: replicas cannot exchange batched gradients, which is_grads_batched=True (vectorize=True) needs; "
                    "use torch.func.vmap over torch.func.vjp"
                ) from error
            raise ReplicaError(self._failure(error)) from error
        return table

    def _mismatch(self, tags: list[float], direction: int) -> str:
        known = {_tag(name): name for name in self.names}
        where = ", ".join(
            f"rank {rank} was in the {'backward' if tag % 1 else 'forward'} of {known.get(tag // 1, 'another layer')}"
            for rank, tag in zip(self.ranks, tags, strict=True)
        )
        name = "backward" if direction else "forward"
        return (
            f"batch norm {self.layer}, {name}: every replica must call the same layers in the same order, but {where}; "
            "give every rank the same model, the same number of steps, and an empty batch where it has no data"
        )

    def _failure(self, error: Exception) -> str:
        group = f"ranks {list(self.ranks)}"
        failed = _failed_ranks(self._process_group, self.ranks, self.ranks[self.rank], self.layer)
        if failed is None:
            missing = "which ranks are missing is unknown"
        else:
            silent = [rank for rank in self.ranks if rank not in failed]
            also = ", ".join(f"rank {rank} in {name}" for rank, name in sorted(failed.items()))
            missing = f"failed: {also}; no answer: {silent or 'none'}"
        return (
            f"batch norm {self.layer}: all of {group} must join its collective within the group's timeout, but it "
            f"failed on rank {self.ranks[self.rank]} ({missing}). A rank died, or ran a different number of layers or steps. {error}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "names": self.names,
            "width": self.width,
            "tag": self.tag,
            "ranks": self.ranks,
            "is_default": self._is_default,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layer, self.names, self.width, self.tag = state["layer"], state["names"], state["width"], state["tag"]
        self.ranks, self._is_default = state["ranks"], state["is_default"]
        self._size = self.rank = 0
        if self._is_default and dist.is_available() and dist.is_initialized():
            self._connect(process_group_of(None), True)

    def __repr__(self) -> str:
        return f"Replicas({self.layer!r}, ranks={list(self.ranks)})"


@transactional()
def synchronize(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Let every batch norm of a model normalize by the statistics of all replicas together in training; in place.

    Outputs, gradients and running statistics are those of a single process with all replicas' batches in one. The batches may differ in
    size; a replica may have no values at all. `convert` first replaces torch's layers. An `nn.SyncBatchNorm` becomes a `BatchNorm`
    over its own process group, unless you pass one. Every replica must call `synchronize`, which compares the models, and then call
    the same layers in the same order. `unsynchronize` undoes it. The logger `batchnorm` says how many layers were synchronized. If some
    were not, it warns and says why, since their statistics will differ between replicas.

    Args:
        model: changed in place; may be a single layer.
        process_group: a group of any backend that contains this process. None is the default group.

    Raises:
        ArgumentError: if model is not a module.
        StateError: if torch.distributed is not initialized, or this process is not in the group.
        ReplicaError: if the replicas' models differ in their batch norms, or one does not answer; then nothing changes.
    """
    _agree(model, process_group_of(process_group))
    converted = convert_layers(slots_of(model), Report("synchronize", "converted"), synchronizing=True)
    layers = _layers(model)
    names = tuple(layers)
    width = max((_row_length(layer) for layer in layers.values()), default=0)
    reducers = [
        Replicas(name, process_group or layer.__dict__.get("process_group"), names, width)
        for name, layer in layers.items()
    ]
    for layer, reducer in zip(layers.values(), reducers, strict=True):
        layer.reducer = reducer
        logger.info("synchronize: %s over ranks %s", reducer.layer, list(reducer.ranks))
    report = Report(
        "synchronize", "normalize over all replicas", list(names), left=converted.left, total=converted.total
    )
    report.log()
    return model


@transactional()
def unsynchronize(model: nn.Module) -> nn.Module:
    """Undo `synchronize`: every batch norm normalizes by the batches of its own replica; in place.

    Raises:
        ArgumentError: if model is not a module.
    """
    for layer in _layers(model).values():
        layer.__dict__.pop("reducer", None)
    return model


class _Exchange(torch.autograd.Function):
    """(K,) -> (W, K). The gradient of a replica's values is the sum of the gradients of all replicas' losses."""

    @staticmethod
    def forward(values: Tensor, replicas: Replicas, direction: int) -> Tensor:
        return replicas.exchange(values, direction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004 (torch's signature)
        _, ctx.replicas, ctx.direction = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Collect.apply(grads[0], ctx.replicas), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Exchange.apply(tangents[0], ctx.replicas, ctx.direction)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], *args: Any) -> Any:
        values, replicas, direction = args
        values = values.movedim(in_dims[0], 0)  # (B, K), in one collective
        return _Exchange.apply(values.flatten(), replicas, direction).unflatten(1, (info.batch_size, -1)), 1


class _Collect(torch.autograd.Function):
    """(W, K) -> (K,): this replica's row of the sum of all tables; the transpose of `_Exchange`."""

    @staticmethod
    def forward(table: Tensor, replicas: Replicas) -> Tensor:
        return replicas.all_reduce(table.clone(memory_format=torch.contiguous_format))[replicas.rank].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004 (torch's signature)
        ctx.replicas = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grads[0], ctx.replicas, _BACKWARD), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Collect.apply(tangents[0], ctx.replicas)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, ...], *args: Any) -> Any:
        table, replicas = args
        table = table.movedim(in_dims[0], 1)  # (W, B, K)
        return _Collect.apply(table.flatten(1), replicas).unflatten(0, (info.batch_size, -1)), 0


def _exchanged(values: Tensor, replicas: Replicas, direction: int) -> Tensor:
    if differentiated_by_torch() or (values.requires_grad and torch.is_grad_enabled()):
        return _Exchange.apply(values, replicas, direction)
    return replicas.exchange(values, direction)


def _agree(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Check that all replicas have the same batch norms; tables of different sizes would fail in the backend, which names no layer."""
    mine = {
        slot.path or "the model": slot.module.num_features
        for slot in walk(model)
        if isinstance(slot.module, _BatchNorm)
    }
    found: list[dict[str, int] | None] = [None] * dist.get_world_size(group)
    ranks = dist.get_process_group_ranks(group)
    try:
        dist.all_gather_object(found, mine, group=group)
    except (RuntimeError, ValueError) as error:
        raise ReplicaError(f"all of ranks {ranks} must call synchronize, but not all did. {error}") from error
    for rank, theirs in zip(ranks, found, strict=True):
        first = found[0]
        assert first is not None
        assert theirs is not None
        differing = next((name for name in [*first, *theirs] if first.get(name) != theirs.get(name)), None)
        if differing is not None:
            has = [
                f"{layers[differing]} channels" if differing in layers else "no such layer"
                for layers in (first, theirs)
            ]
            raise ReplicaError(
                f"every replica must have the same batch norms, but {differing} has {has[0]} on rank {ranks[0]} and {has[1]} "
                f"on rank {rank}; give every rank the same model"
            )


def _row_length(layer: BatchNorm) -> int:
    """1 for the count, 2 for each channel, or for each component of a complex channel."""
    given = layer.running_mean if layer.weight is None else layer.weight
    return 1 + 2 * layer.num_features * (2 if given is not None and given.is_complex() else 1)


def _layers(model: nn.Module) -> dict[str, BatchNorm]:
    """Each `BatchNorm` of a model once, under its first name."""
    return {name: layer for name, layer in batch_norms(model).items() if isinstance(layer, BatchNorm)}


def _tag(layer: str) -> float:
    return float(zlib.crc32(layer.encode()))


def process_group_of(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise StateError(
            "torch.distributed must be initialized before replicas can be synchronized; call "
            "torch.distributed.init_process_group first, or leave synchronize out in a single process"
        )
    if group is None:
        found = dist.group.WORLD
        assert found is not None
        return found
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise StateError("this process must belong to the process group, but does not; pass the group of this rank")
    return group


def _failed_ranks(group: dist.ProcessGroup, ranks: tuple[int, ...], rank: int, layer: str) -> dict[int, str] | None:
    """The ranks that failed, and in which layer: each writes itself into the group's store, and waits `GRACE` for others."""
    try:
        store = dist.distributed_c10d._get_process_group_store(group)
        store.set(f"batchnorm/failed/{rank}", layer)
        deadline = time.monotonic() + GRACE
        failed = {rank: layer}
        while len(failed) < len(ranks) and time.monotonic() < deadline:
            for other in ranks:
                key = f"batchnorm/failed/{other}"
                if other not in failed and store.check([key]):
                    failed[other] = store.get(key).decode()
            time.sleep(0.05)
        return failed
    except (RuntimeError, AttributeError):  # the store ended with the rank that hosted it
        return None
