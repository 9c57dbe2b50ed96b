"""Data that come in pairs or groups: forwards in which no sample's batch tells what it belongs to.

Batch statistics identify a batch. If the two views of an image are normalized in the batches of one replica, or positive and negative
samples in batches of their own, a network can read the pairs, or the labels, off the statistics, and lower its loss without learning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from batchnorm.distributed import process_group_of
from batchnorm.errors import ArgumentError, InputError
from batchnorm.surgery import training_mode


def jointly(forward: Callable[..., Any], *batches: Any) -> list[Any]:
    """Forward several batches as one, so that batch norms normalize all of them by common statistics; return the output of each.

    Batches may differ in their number of samples. Their other sizes must be equal; if not, use `as_one_batch`. Running statistics are
    updated once.

        first, second = bn.jointly(encoder, views, other_views)

    Args:
        forward: called once; a model, for example.
        batches: tensors (N, ...) with the samples on the first axis, or tuples of such tensors, which become the arguments of `forward`.

    Returns:
        For each batch its part of the output, which may be a tensor (N, ...) or a nest of such tensors in tuples, lists and dicts.

    Raises:
        InputError: if there is no batch, batches have different numbers of tensors, the tensors of one have different numbers of samples,
            or the output does not have one row for each sample.
        ArgumentError: if a batch is neither a tensor nor a tuple of tensors.
    """
    if not batches:
        raise InputError("jointly needs at least one batch, but got none")
    rows = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    sizes = [_samples(row) for row in rows]
    if len({len(row) for row in rows}) > 1:
        counts = ", ".join(str(len(row)) for row in rows)
        raise InputError(
            f"all batches must have the same number of tensors, but they have {counts}; pass the same arguments in each"
        )
    output = forward(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    leaves, nest = pytree.tree_flatten(output)
    total = sum(sizes)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != total:
            what = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise InputError(
                f"each output must be a tensor with a row for each of {total} samples, but got {what}; return it so"
            )
    return [
        pytree.tree_unflatten(list(parts), nest) for parts in zip(*(leaf.split(sizes) for leaf in leaves), strict=True)
    ]


def joint_values(critic: nn.Module, now: Any, later: Any) -> tuple[Any, Any]:
    """Values of transitions, and of what followed without their gradient, in one forward with the critic's batch norms in training.

    This is how CrossQ trains a critic without a target network (Bhatt et al. 2024, arXiv:1902.05605, figure 3): actions of the policy
    and of the replay buffer have other statistics, and are normalized together. Afterwards each batch norm is in its former mode.

    Args:
        critic: called once, with the concatenated arguments.
        now: the states, or a tuple such as (states, actions), (N, ...) each.
        later: the next states, or (next_states, next_actions), with actions of the present policy in inference.

    Returns:
        The values for `now`, and the values for `later` detached; each as the critic returns them, such as a tuple of a twin critic.

    Raises:
        ArgumentError: if critic is not a module.
        InputError: as `jointly`.
    """
    with training_mode(critic, True):
        values, next_values = jointly(critic, now, later)
    return values, pytree.tree_map(Tensor.detach, next_values)


def shuffled(
    forward: Callable[[Tensor], Tensor], batch: Tensor, *, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Forward a batch whose samples are dealt to the replicas at random, and return the outputs in the order of the batch.

    This is shuffling BN (He et al. 2020, arXiv:1911.05722, section 3.3): the keys of a contrastive loss are normalized with other samples
    than their queries, so statistics do not tell which key belongs to which query. Forward the queries without it.

        keys = bn.shuffled(key_encoder, images)

    All replicas must call it, and run the backward if one does; gradients flow to the samples' own replicas. Each replica receives the
    samples of all. In a single process the samples of the batch change places, which matters to the groups of `Ghost`. The order comes
    from torch's generator of the first replica.

    Args:
        forward: takes and returns (N, ...), one row for each sample; a model, for example, in training.
        batch: (N, ...), the same sizes on each replica.
        process_group: a group that contains this process. None is the default group if torch.distributed is initialized.

    Raises:
        ArgumentError: if batch is not a tensor.
        InputError: if replicas have different numbers of samples, or the output does not have one row for each.
        StateError: if this process is not in the group.
    """
    if not isinstance(batch, Tensor):
        raise ArgumentError(f"batch must be a tensor, but got {type(batch).__name__}")
    N, seed = _samples((batch,)), int(torch.randint(2**62, ()))
    several = process_group is not None or (dist.is_available() and dist.is_initialized())
    group = process_group_of(process_group) if several else None
    if group is not None:
        seed = _agreed_seed(N, seed, batch.device, group)
    replicas, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    order = torch.randperm(replicas * N, generator=torch.Generator().manual_seed(seed)).to(batch.device)
    own = slice(rank * N, (rank + 1) * N)
    output = forward(_gathered(batch, group)[order[own]])
    if not isinstance(output, Tensor) or output.shape[:1] != (N,):
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"forward must return a tensor with a row for each of {N} samples, but returned {what}")
    return _gathered(output, group)[order.argsort()[own]]


def _samples(tensors: tuple[Any, ...]) -> int:
    """The number of samples, which all tensors of a batch share."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"a batch must be a tensor or a tuple of tensors, but got {type(tensor).__name__}")
    counts = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    count = counts.pop() if counts else None
    if counts or count is None:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise InputError(
            f"the tensors of a batch must have the same number of samples on their first axis, but got {shapes or 'none'}"
        )
    return count


def _agreed_seed(samples: int, seed: int, device: torch.device, group: dist.ProcessGroup) -> int:
    """The seed of the first replica, after a check that all have the same number of samples."""
    own = torch.tensor([samples, seed], device=device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, own, group=group)
    counts, seeds = torch.stack(rows).T.tolist()
    if len(set(counts)) > 1:
        raise InputError(
            f"every replica must pass the same number of samples to shuffled, but ranks {dist.get_process_group_ranks(group)} passed "
            f"{counts}; drop the incomplete last batch (drop_last=True)"
        )
    return seeds[0]


def _gathered(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(N, ...) -> (W * N, ...): the rows of all replicas, in the order of the ranks."""
    return values if group is None else _Gather.apply(values, group)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    """The gradient of a replica's rows is the sum of the gradients of all replicas' losses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.samples = group, values.shape[0]
        values = values.contiguous()
        rows = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, values, group=group)
        return torch.cat(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        return total[rank * ctx.samples : (rank + 1) * ctx.samples].clone(), None
