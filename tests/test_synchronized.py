"""Synchronized layers in all they meet: what torch tests of its SyncBatchNorm, the parts, torch.func, autocast, FSDP2, compiled code."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import StateError
from batchnorm.statistics import Ghost, Renorm, Running
from tests.replicas import on_replicas
from tests.test_distributed import close

WIDE = torch.float64


def counted(call):
    """How many collectives a call makes."""
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *arguments, **named: calls.append(1) or all_reduce(*arguments, **named)
    try:
        call()
    finally:
        dist.all_reduce = all_reduce
    return len(calls)


def buffers_equal(what, ours, single, tolerance=1e-6):
    for name, wanted in single.named_buffers():
        close(f"{what} {name}", ours.get_buffer(name), wanted, tolerance)


# What torch tests of its SyncBatchNorm, on gloo


def uneven_running_values(rank, size):
    """The running mean of unevenly many samples is that of all of them, not of the ranks' means; for several steps."""
    layer = bn.synchronize(nn.BatchNorm1d(2, momentum=0.99)).double()
    wrapped = DistributedDataParallel(layer)
    wanted_mean, wanted_var = torch.zeros(2, dtype=WIDE), torch.ones(2, dtype=WIDE)
    for step in range(3):
        parts = [torch.arange(2.0 * (2 + 3 * r), dtype=WIDE).view(-1, 2) ** 2 - 5 * r + step for r in range(size)]
        wrapped(parts[rank])
        whole = torch.cat(parts)
        wanted_mean = 0.01 * wanted_mean + 0.99 * whole.mean(0)
        wanted_var = 0.01 * wanted_var + 0.99 * whole.var(0)
    close("running mean", layer.running_mean, wanted_mean, 1e-12)
    close("running variance", layer.running_var, wanted_var, 1e-12)


def network(first):
    return nn.Sequential(first, nn.ReLU(), nn.Linear(4, 2, bias=False), nn.BatchNorm1d(2), nn.Linear(2, 3))


def against_one_process(what, rank, size, model, x, sizes):
    """Three steps of SGD under DDP, and in one process with all samples: the same parameters and buffers."""
    ours = DistributedDataParallel(bn.synchronize(copy.deepcopy(model)))
    start = sum(sizes[:rank])
    for given, part, scale in ((model, slice(None), 1), (ours, slice(start, start + sizes[rank]), size)):
        optimizer = torch.optim.SGD(given.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (given(x[part]).square().sum() * scale / len(x)).backward()  # DDP divides by the ranks
            optimizer.step()
    for (name, found), wanted in zip(ours.module.named_parameters(), model.parameters(), strict=True):
        close(f"{what} {name}", found, wanted, 1e-11)
    buffers_equal(what, ours.module, model, 1e-11)


def torchs_tests(rank, size):
    uneven_running_values(rank, size)
    torch.manual_seed(3)
    x = torch.randn(8, 4, dtype=WIDE)
    uneven = (5, 3) if size == 2 else (4, 1, 3, 0)
    against_one_process("gradients", rank, size, network(nn.BatchNorm1d(4)).double(), x, uneven)
    against_one_process("no affine", rank, size, network(nn.BatchNorm1d(4, affine=False)).double(), x, uneven)
    against_one_process("single", rank, size, network(nn.BatchNorm1d(4)).double(), x[:size], (1,) * size)
    layer = bn.synchronize(nn.BatchNorm2d(3))
    given = torch.randn(0, 3, 2, 2, requires_grad=True)
    y = layer(given)  # nobody has any
    y.sum().backward()
    assert y.shape == given.grad.shape == given.shape
    assert layer.weight.grad.eq(0).all()
    assert layer.running_var.eq(1).all()
    process_groups(rank, size)


def process_groups(rank, size):
    """An nn.SyncBatchNorm keeps its group, becomes ours as the same object, and torch's again."""
    group = [dist.new_group([r]) for r in range(size)][rank]
    theirs = nn.SyncBatchNorm(3, process_group=group), nn.SyncBatchNorm(3)
    model = bn.synchronize(nn.Sequential(*theirs, nn.SyncBatchNorm(3)))
    assert list(model[:2]) == list(theirs)
    assert [type(layer) for layer in model] == [bn.BatchNorm] * 3
    assert [layer.reducer.size for layer in model] == [1, size, size]
    x = torch.arange(12.0).view(4, 3) + 100 * rank
    assert counted(lambda: model[0](x)) == 0
    assert counted(lambda: model[1](x)) == 1
    model[1].reset_running_stats()
    model[1](x.unsqueeze(2).unsqueeze(3))  # of any rank
    torch.testing.assert_close(model[1].running_mean, 0.1 * (torch.tensor([4.5, 5.5, 6.5]) + 50 * (size - 1)))
    bn.synchronize(model, group)
    assert [layer.reducer.size for layer in model] == [1, 1, 1]
    bn.revert(bn.unsynchronize(model))
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm] * 3
    assert theirs[0].process_group is group


# The parts, masks


def parts(rank, size):
    torch.manual_seed(4)
    whole = 3 * torch.randn(6 * size, 5, 3, dtype=WIDE) + 10
    mine = whole[6 * rank : 6 * rank + 6]
    mask = torch.rand(6 * size, 3) > 0.3
    plain = bn.BatchNorm1d(5, dtype=WIDE)
    plain(whole)
    local, ghost = (bn.BatchNorm1d(5, dtype=WIDE, statistics=Ghost(4)) for _ in range(2))
    bn.synchronize(ghost)
    x, other = mine.clone().requires_grad_(), mine.clone().requires_grad_()
    y = ghost(x)
    close("ghost", y, local(other), 0)  # groups are a replica's own
    assert counted(lambda: y.square().sum().backward()) == 0
    local(other).square().sum().backward()
    close("ghost dx", x.grad, other.grad, 0)
    buffers_equal("ghost", ghost, plain)
    masked, ghost = bn.BatchNorm1d(5, dtype=WIDE), bn.synchronize(bn.BatchNorm1d(5, dtype=WIDE, statistics=Ghost(4)))
    masked(whole, mask=mask)
    ghost(mine, mask=mask[6 * rank : 6 * rank + 6])
    buffers_equal("masked ghost", ghost, masked)
    single_values_in_groups(rank, size)
    renormalized(rank, whole, mask)
    frozen = bn.synchronize(bn.BatchNorm1d(5, dtype=WIDE, statistics=Running()))
    assert counted(lambda: frozen(x).sum().backward()) == 0


def single_values_in_groups(rank, size):
    """A replica with one value has no variance of its own, but the others wait for it."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    plain = bn.BatchNorm1d(3)
    for _ in range(size - 1):
        plain(x)
    for on_single in ("running", "skip"):
        layer = bn.synchronize(bn.BatchNorm1d(3, statistics=Ghost(4), on_single=on_single))
        y = layer(x[:1] if rank == 0 else x)
        if rank == 0:
            close(on_single, y, x[:1] / (1 + 1e-5) ** 0.5 if on_single == "running" else 0 * y, 1e-6)
        several = [x] * (size - 1)
        wanted = torch.cat(several)
        close(on_single, layer.running_mean, 0.1 * wanted.mean(0), 1e-6)
        close(on_single, layer.running_var, 0.9 + 0.1 * wanted.var(0), 1e-6)


def renormalized(rank, whole, mask):
    part = slice(6 * rank, 6 * rank + 6)
    single = bn.BatchNorm1d(5, dtype=WIDE, statistics=Renorm(2.0, 1.0, warmup=0), activation="silu")
    ours = bn.synchronize(copy.deepcopy(single))
    for step in range(3):
        x, mine = (1 + step) * whole, (1 + step) * whole[part]
        x, mine = x.requires_grad_(), mine.detach().requires_grad_()
        chosen = mask if step else None
        single(x, mask=chosen).sin().sum().backward()
        results = []

        def forward(mine=mine, chosen=chosen, results=results):
            results.append(ours(mine, mask=None if chosen is None else chosen[part]))

        assert counted(forward) == 1
        assert counted(lambda results=results: results[0].sin().sum().backward()) == 1
        close("renorm dx", mine.grad, x.grad[part], 1e-11)
        whole = whole.detach()
        buffers_equal("renorm", ours, single)
    for reentrant in (True, False):
        x, mine = whole.clone().requires_grad_(), whole[part].clone().requires_grad_()
        single(x).sin().sum().backward()
        checkpoint(ours, mine, use_reentrant=reentrant).sin().sum().backward()
        close("renorm dx, checkpointed", mine.grad, x.grad[part], 1e-11)
        buffers_equal("renorm, checkpointed", ours, single)


# torch.func


def transforms(rank, size):
    torch.manual_seed(6)
    whole = torch.randn(4 * size, 3, dtype=WIDE)
    part = slice(4 * rank, 4 * rank + 4)
    single = bn.BatchNorm1d(3, dtype=WIDE, activation="gelu")
    ours = bn.synchronize(copy.deepcopy(single))
    v = torch.randn_like(whole)
    given = whole[part].clone().requires_grad_()
    with pytest.raises(StateError, match="is_grads_batched"):
        torch.autograd.grad(ours(given), given, torch.ones(2, 4, 3, dtype=WIDE), is_grads_batched=True)
    ours.load_state_dict(single.state_dict())
    _, vjp = torch.func.vjp(ours, whole[part])
    directions = torch.stack([v, v.sin()])
    _, wanted = torch.func.vjp(single, whole)
    (found,), (wanted,) = torch.func.vmap(vjp)(directions[:, part]), torch.func.vmap(wanted)(directions)
    close("vmap of vjp", found, wanted[:, part], 1e-12)
    close("grad", torch.func.grad(lambda x: ours(x).sin().sum())(whole[part]), _grad(single, whole)[part], 1e-12)
    for name, found, wanted in (
        ("jvp", torch.func.jvp(ours, (whole[part],), (v[part],)), torch.func.jvp(single, (whole,), (v,))),
        ("vmap", _mapped(ours, whole[part]), _mapped(single, whole)),
    ):
        for a, b in zip(found, wanted, strict=True):
            close(name, a, b[part] if name == "jvp" else b[:, part], 1e-12)
    mapped = torch.func.vmap(torch.func.grad(lambda x: ours(x).sin().sum()))
    with bn.recomputation():  # the buffers are shared by all slices, which have statistics of their own
        found = mapped(torch.stack([whole[part], 2 * whole[part]]))
    for gradient, scale in zip(found, (1, 2), strict=True):
        close("vmap of grad", gradient, _grad(single, scale * whole)[part], 1e-12)


def _grad(layer, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(layer(x).sin().sum(), x)[0]


def _mapped(layer, x):
    with bn.recomputation():
        return [torch.func.vmap(layer)(torch.stack([x, 3 * x.square()]))]


# Autocast, FSDP2, compiled code


def surroundings(rank, size):
    torch.manual_seed(7)
    whole = torch.randn(8, 3) * 4 + 20
    part = slice(0, 3) if rank == 0 else slice(3, 8)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    single = bn.convert(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = single(whole)
        wanted.sum().backward()
    ours = bn.synchronize(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(whole[part])
        y.sum().backward()
    close("autocast", y, wanted[part], 2**-7)
    assert y.dtype is torch.bfloat16
    buffers_equal("autocast", ours, single, 1e-6)
    for name, parameter in ours.named_parameters():
        dist.all_reduce(parameter.grad)
        if name != "0.weight":  # whose gradient is rounding: nothing but cancellation is left behind a sum
            close(f"autocast {name}", parameter.grad, single.get_parameter(name).grad, 2**-6)

    single = bn.convert(copy.deepcopy(model).double())
    single(whole.double()).square().sum().backward()
    sharded = bn.synchronize(copy.deepcopy(model).double())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (size,)))
    sharded(whole[part].double()).square().sum().backward()
    for name, parameter in sharded.named_parameters():
        close(f"FSDP2 {name}", parameter.grad.full_tensor() * size, single.get_parameter(name).grad, 1e-11)
    buffers_equal("FSDP2", sharded, single, 1e-11)

    ours = bn.synchronize(copy.deepcopy(model).double())

    def checkpointed(x):
        return ours[3](checkpoint(ours[:3], x, use_reentrant=False))

    compiled = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
    compiled(whole[part].double()).square().sum().backward()
    compare_gradients("checkpoint in compiled code", ours, single)


def compare_gradients(what, ours, single):
    for name, parameter in ours.named_parameters():
        total = parameter.grad.clone()
        dist.all_reduce(total)
        close(f"{what} {name}", total, single.get_parameter(name).grad, 1e-11)
    buffers_equal(what, ours, single, 1e-11)


def inductor(rank, size):
    torch.manual_seed(8)
    whole = torch.randn(8, 3, dtype=WIDE)
    single = bn.BatchNorm1d(3, activation="relu", dtype=WIDE)
    ours = bn.synchronize(copy.deepcopy(single))
    single(whole).square().sum().backward()
    torch.compile(ours, fullgraph=True)(whole[:3] if rank == 0 else whole[3:]).square().sum().backward()
    compare_gradients("inductor", ours, single)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_torch_tests_of_its_own(size):
    on_replicas(torchs_tests, size)


def test_parts_of_replicas():
    on_replicas(parts, 2)


def test_torch_func_over_replicas():
    on_replicas(transforms, 2)


def test_autocast_sharded_parameters_and_checkpoints_in_compiled_code():
    on_replicas(surroundings, 2)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_inductor_compiles_replicas_into_one_graph():
    on_replicas(inductor, 2)
