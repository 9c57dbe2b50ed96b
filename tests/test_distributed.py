"""Replicas against one process with all their batches in one: outputs, gradients, running statistics; faults; collectives counted."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import ReplicaError, StateError
from tests.replicas import impatient, on_replicas

SPLITS = {2: [(3, 5), (7, 1), (0, 8)], 4: [(2, 2, 2, 2), (1, 4, 0, 3), (0, 0, 0, 8)]}
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8}


def close(what, found, wanted, tolerance):
    """Relative to the largest value wanted."""
    error = (found.double() - wanted.double()).abs().max().item() if found.numel() else 0.0
    scale = wanted.double().abs().max().item() if wanted.numel() else 0.0
    assert found.shape == wanted.shape, what
    assert error <= tolerance * scale + 1e-300, f"{what}: off by {error / max(scale, 1e-300):.2g} of {scale:.2g}"


def compare(rank, sizes, layer, x, mask=None, residual=None, group=None, weights=None):
    """One step of a synchronized copy on this rank's part of x, beside one of the layer itself on all of x."""
    single, ours = layer, bn.synchronize(copy.deepcopy(layer), group)
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    tolerance = TOLERANCE[x.dtype]
    dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(x.dtype)
    whole = x.clone(memory_format=torch.preserve_format).requires_grad_()
    mine = x[part].clone(memory_format=torch.preserve_format).requires_grad_()

    def cut(value):
        return None if value is None else value[part]

    y = single(whole, mask=mask, residual=residual, weights=weights)
    y.backward(dy)
    z = ours(mine, mask=cut(mask), residual=cut(residual), weights=cut(weights))
    z.backward(dy[part])
    close("output", z, y[part], tolerance)
    close("dx", mine.grad, whole.grad[part], tolerance)
    for name, parameter in ours.named_parameters():
        total = parameter.grad.double()
        dist.all_reduce(total, group=group)
        close(name, total, dict(single.named_parameters())[name].grad, tolerance)
    for name, buffer in ours.named_buffers():
        close(name, buffer, dict(single.named_buffers())[name], min(tolerance, 1e-6))


def equal_to_one_process(rank, size):
    for sizes in SPLITS[size]:
        for dtype in TOLERANCE:
            torch.manual_seed(1)
            x = (3 * torch.randn(8, 5, 4, 3, dtype=torch.float64) + 10).to(dtype)
            wide = None if dtype is torch.bfloat16 else dtype
            for layout in (torch.contiguous_format, torch.channels_last):
                compare(rank, sizes, bn.BatchNorm2d(5, dtype=wide), x.contiguous(memory_format=layout))
            mask = torch.rand(8, 4, 3) > 0.3
            compare(rank, sizes, bn.BatchNorm2d(5, dtype=wide, activation="relu"), x, mask, torch.randn_like(x))
            weights = torch.rand(8)
            compare(rank, sizes, bn.BatchNorm2d(5, dtype=wide, activation="relu"), x, mask, weights=weights)
            compare(rank, sizes, bn.BatchNorm2d(5, affine=False, dtype=wide, activation="silu"), x)
            compare(rank, sizes, bn.BatchNorm2d(5, momentum=None, dtype=wide), x)
    group_of = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])] if size == 4 else [dist.new_group([0, 1])]
    group = group_of[rank // 2]
    compare(
        rank % 2, (6, 2), bn.BatchNorm1d(4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64), group=group
    )
    compare(rank, (1,) * size, bn.BatchNorm1d(4), torch.randn(size, 4))  # a single value each
    nonfinite_batches(rank)
    double_backward(rank, size)
    collectives_are_one_each_way(rank)
    wrong_order(rank, size)
    if size == 2:
        different_models(rank, size)


def nonfinite_batches(rank):
    """A NaN on one rank: all skip, or all raise."""
    x = torch.full((4, 3), torch.nan) if rank == 1 else torch.randn(4, 3)
    layer = bn.synchronize(bn.BatchNorm1d(3))
    layer(x)
    assert layer.running_mean.eq(0).all()
    assert layer.num_nonfinite_batches == 1
    with pytest.raises(bn.errors.InputError, match="finite"):
        bn.synchronize(bn.BatchNorm1d(3, on_nonfinite="error"))(x)
    layer = bn.synchronize(bn.BatchNorm1d(3, on_nonfinite="propagate"))
    layer(x)
    assert layer.running_mean.isnan().all()


def double_backward(rank, size):
    torch.manual_seed(2)
    x = torch.randn(2 * size, 3, dtype=torch.float64)
    whole, mine = x.clone().requires_grad_(), x[2 * rank : 2 * rank + 2].clone().requires_grad_()
    single = bn.BatchNorm1d(3, dtype=torch.float64, activation="silu")
    ours = bn.synchronize(copy.deepcopy(single))
    for layer, given in ((single, whole), (ours, mine)):
        (first,) = torch.autograd.grad(layer(given).sin().sum(), given, create_graph=True)
        first.square().sum().backward()
    close("second derivative", mine.grad, whole.grad[2 * rank : 2 * rank + 2], 1e-12)


def collectives_are_one_each_way(rank):
    calls = []
    all_reduce = dist.all_reduce
    model = bn.synchronize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)))
    dist.all_reduce = lambda *arguments, **named: calls.append(1) or all_reduce(*arguments, **named)
    try:
        y = model(torch.randn(4, 3))
        assert len(calls) == 2
        y.sum().backward()
        assert len(calls) == 4
    finally:
        dist.all_reduce = all_reduce


def wrong_order(rank, size):
    """Of any widths: gloo ends the process where tables differ in size."""
    for C in (3, 300):
        model = bn.synchronize(nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.BatchNorm1d(C)}))
        with pytest.raises(ReplicaError, match="rank 0 was in the forward of a, rank 1 was in the forward of b"):
            model["b" if rank else "a"](torch.randn(4, C if rank else 3))


def wrappers(rank, size):
    """DDP, both checkpoints, autocast, compiled code, deepcopy and pickle."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, dtype=torch.float64)
    mine = x[:3] if rank == 0 else x[3:]
    linear = nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False)  # before a batch norm a bias has no gradient
    single = nn.Sequential(linear[0], bn.BatchNorm1d(4), nn.ReLU(), linear[1], bn.BatchNorm1d(4)).double()
    single.append(nn.Linear(4, 2).double())
    start = copy.deepcopy(single)
    single(x).square().sum().backward()

    def check(what, model, forward):
        forward(mine).square().sum().backward()
        for (name, found), wanted in zip(model.named_parameters(), single.parameters(), strict=True):
            total = found.grad.clone()
            if what != "ddp":
                dist.all_reduce(total)
            close(f"{what} {name}", total, wanted.grad / (size if what == "ddp" else 1), 1e-10)
        for (name, found), wanted in zip(model.named_buffers(), single.buffers(), strict=True):
            close(f"{what} {name}", found, wanted, 1e-12)

    def fresh():
        return bn.synchronize(copy.deepcopy(start))

    model = fresh()
    check("ddp", model, DistributedDataParallel(model))
    for reentrant in (False, True):
        model = fresh()

        def forward(x, model=model, reentrant=reentrant):
            return checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)

        check(f"checkpoint, reentrant {reentrant}", model, forward)
    model = fresh()
    check("compile", model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    model = fresh()
    check("pickle", again := pickle.loads(pickle.dumps(copy.deepcopy(model))), again)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bn.synchronize(copy.deepcopy(start).float())(mine.float())
    assert y.isfinite().all()
    undone = bn.unsynchronize(model)
    assert undone[1].reducer is None


def dying(rank, size):
    model = nn.ModuleDict({"first": nn.BatchNorm1d(3), "second": nn.BatchNorm1d(3)})
    bn.synchronize(model, impatient(5))
    y = model["first"](torch.randn(4, 3))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(ReplicaError, match=r"batch norm second: all of ranks \[0, 1.*no answer: \[.*1"):
        model["second"](y)
    assert time.monotonic() - start < 20


def fewer_layers(rank, size):
    """Rank 1 leaves a layer out and waits elsewhere: an error within the timeout."""
    layer = bn.synchronize(nn.ModuleDict({"one": nn.BatchNorm1d(3)}), impatient(1))["one"]
    if rank == 0:
        with pytest.raises(ReplicaError, match=r"batch norm one: .*ranks \[0, 1\].*no answer: \[1\]"):
            layer(torch.randn(4, 3))
        dist.distributed_c10d._get_default_store().set("raised", "")
    else:
        dist.distributed_c10d._get_default_store().wait(["raised"])


def different_models(rank, size):
    """Found when they are synchronized, and on every rank."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(3 + rank))
    with pytest.raises(ReplicaError, match="1 has 3 channels on rank 0 and 4 channels on rank 1"):
        bn.synchronize(model)
    assert type(model[0]) is nn.BatchNorm1d
    with pytest.raises(ReplicaError, match="1 has no such layer on rank 0 and 3 channels on rank 1"):
        bn.synchronize(nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(1 + rank))))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_equal_one_process(size):
    on_replicas(equal_to_one_process, size)


def test_wrappers_around_replicas():
    on_replicas(wrappers, 2)


def test_a_dead_replica_is_an_error_that_names_the_layer():
    on_replicas(dying, 4, killed=(1,))


def test_a_layer_left_out_is_an_error_within_the_timeout():
    on_replicas(fewer_layers, 2)


def test_synchronizing_needs_a_process_group():
    with pytest.raises(StateError, match="initialized"):
        bn.synchronize(nn.Sequential(nn.BatchNorm1d(3)))
