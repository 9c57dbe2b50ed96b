"""Compares replicas: merges their running statistics, and finds where parameters and buffers differ."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, is_lazy

from batchnorm.distributed import Replicas
from batchnorm.errors import ArgumentError, ReplicaError, StateError
from batchnorm.functional.components import components_of_buffer
from batchnorm.layers import STATISTICS
from batchnorm.logs import logger
from batchnorm.merging import merged, source_buffers
from batchnorm.statistics.contract import is_frozen
from batchnorm.surgery import batch_norms
from batchnorm.surgery.transaction import transactional


@dataclass(frozen=True)
class Difference:
    """A parameter or buffer that differs between ranks.

    Attributes:
        name: as in the state_dict.
        ranks: the ranks whose value differs from that of the group's first rank.
        largest: the largest difference between two ranks in one element; NaN if one of them has NaN.
    """

    name: str
    ranks: tuple[int, ...]
    largest: float

    def __str__(self) -> str:
        return f"{self.name}: ranks {list(self.ranks)} differ from the first, by up to {self.largest:.3g}"


@dataclass(frozen=True)
class Agreement:
    """Whether replicas agree: true if all parameters and buffers are equal bit by bit. Its `str` lists those that differ.

    Attributes:
        differences: parameters and buffers that differ, in the order of the model.
    """

    differences: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        return "\n".join(map(str, self.differences)) or "all replicas agree"


@transactional(values=True)
@torch.no_grad()
def average_buffers(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Merge the running statistics of all replicas, in place, and return the model; one all_reduce for all layers.

        mean     = Σ w_i mean_i
        variance = Σ w_i (variance_i + (mean_i - mean)²)

    The second term is the variance between replicas, which a plain average of variances misses. The weight w_i is the share of data in a
    replica's moving average: 1 - (1 - momentum)^n after n batches, or n if momentum is None. So replicas with the same number of batches
    have the same weight, and one without batches has weight 0. Each counter is set to its largest value on any replica. All replicas get
    the same bits.

    Each domain of `Domains` is merged in the same way, weighted by its own batches. Each row of the windows of `MovingAverage` is merged
    over the replicas that have had enough batches; rows of gradients are averaged over the replicas that have written them. Buffers of
    any other source (`SourceBuffer`) are merged by the rules of the buffer in their field `like`.

    Use it before a checkpoint or an evaluation if layers normalize by the batches of their own replica (no `synchronize`). Frozen layers
    and layers without running statistics do not change.

    Args:
        model: may have layers of torch and of this library.
        process_group: None is the default group.

    Raises:
        ArgumentError: if model is not a module.
        StateError: if torch.distributed is not initialized, or this process is not in the group; if a layer is lazy.
        ReplicaError: if a rank did not answer.
    """
    layers = _layers(model)
    if not layers:
        logger.warning("average_buffers: the model has no batch norm with running statistics")
        return model
    states = {name: _state(layer) for name, layer in layers.items()}
    rows = {name: torch.cat([_numbers(value).flatten() for value in state.values()]) for name, state in states.items()}
    replicas = Replicas("average_buffers", process_group)
    everywhere = replicas.exchange(torch.cat(list(rows.values())))  # (W, K)
    tables = everywhere.split([len(row) for row in rows.values()], 1)
    for (name, layer), table in zip(layers.items(), tables, strict=True):
        state = {key: _numbers(value) for key, value in states[name].items()}
        slices = table.split([value.numel() for value in state.values()], 1)
        of_all = {
            key: columns.unflatten(1, value.shape) if value.dim() else columns[:, 0]
            for (key, value), columns in zip(state.items(), slices, strict=True)
        }  # (W, *shape) each
        for key, value in merged(layer, of_all).items():
            buffer = states[name][key]
            (components_of_buffer(buffer) if buffer.is_complex() else buffer).copy_(value)
        logger.info("average_buffers: merged %s over ranks %s", name, list(replicas.ranks))
    return model


@torch.no_grad()
def replicas_agree(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> Agreement:
    """Compare every parameter and buffer of a model over all ranks, bit by bit.

        agreement = bn.replicas_agree(model)
        if not agreement:
            print(agreement)

    It takes two all_reduces of digests, and two for each tensor that differs. Shards of sharded models (DTensor) are not compared.

    Args:
        model: the same architecture on all ranks.
        process_group: None is the default group.

    Raises:
        ArgumentError: if model is not a module.
        StateError: if torch.distributed is not initialized, or this process is not in the group.
        ReplicaError: if a rank did not answer, or the models have tensors of other names, shapes or dtypes.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: value.detach() for name, value in named if type(value.detach()) is Tensor and not is_lazy(value)}
    replicas = Replicas("replicas_agree", process_group)
    device = next((value.device for value in tensors.values()), torch.device("cpu"))
    layout = _digest(repr([(name, tuple(value.shape), value.dtype) for name, value in tensors.items()]).encode())
    layouts = replicas.exchange(torch.tensor([layout], dtype=torch.float64, device=device))[:, 0].tolist()
    if any(other != layouts[0] for other in layouts):
        others = [rank for rank, other in zip(replicas.ranks, layouts, strict=True) if other != layouts[0]]
        raise ReplicaError(
            f"replicas must have tensors of the same names, shapes and dtypes, but those of ranks {others} differ from rank "
            f"{replicas.ranks[0]}; build the same model on every rank"
        )
    digests = [_digest(_bytes(value)) for value in tensors.values()]
    everywhere = replicas.exchange(torch.tensor(digests, dtype=torch.float64, device=device))  # (W, tensors)
    differences = list[Difference]()
    for i, (name, value) in enumerate(tensors.items()):
        same = everywhere[:, i].eq(everywhere[0, i]).tolist()
        if not all(same):
            ranks = tuple(rank for rank, equal in zip(replicas.ranks, same, strict=True) if not equal)
            differences.append(Difference(name, ranks, _spread(value, replicas)))
    return Agreement(tuple(differences))


def _layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms with running statistics that are not frozen."""
    layers = {name: layer for name, layer in batch_norms(model).items() if layer.running_mean is not None}
    for name, layer in layers.items():
        if isinstance(layer.running_mean, UninitializedBuffer):
            raise StateError(f"{name}: a lazy layer must have had its first input; call the model once")
    return {name: layer for name, layer in layers.items() if not is_frozen(layer)}


def _state(layer: _BatchNorm) -> dict[str, Tensor]:
    """The buffers of a layer to merge, by name: running statistics, counters, and those of its statistics source."""
    names = (*STATISTICS, "num_batches_tracked", *source_buffers(layer), "num_nonfinite_batches")
    return {name: value for name in names if (value := getattr(layer, name, None)) is not None}


def _numbers(value: Tensor) -> Tensor:
    return (components_of_buffer(value) if value.is_complex() else value).double()


def _bytes(value: Tensor) -> bytes:
    return bytes(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data) if value.numel() else b""


def _digest(data: bytes) -> float:
    """52 bits of SHA-256, which a float64 holds exactly."""
    return float(int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 12)


def _spread(value: Tensor, replicas: Replicas) -> float:
    """The largest difference between two ranks."""
    wide = (torch.view_as_real(value) if value.is_complex() else value).double()
    largest, smallest = wide.clone(), wide.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, replicas._process_group)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, replicas._process_group)
    return (largest - smallest).max().item()
