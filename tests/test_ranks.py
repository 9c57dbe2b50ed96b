"""Over ranks: population statistics of everybody's data, running statistics averaged, replicas compared. One spawn for all."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.errors import ArgumentError, InputError, ReplicaError, StateError
from batchnorm.statistics import Batch, Domains, MovingAverage, Renorm, SourceBuffer
from tests.replicas import impatient, on_replicas
from tests.test_population import clusters, network, same, state


def equal(found, wanted, tolerance=1e-12):
    buffers = dict(found.named_buffers())
    for name, other in wanted.state_dict().items():
        value = buffers.get(name, other)  # parameters are nobody's
        torch.testing.assert_close(value, other, rtol=tolerance, atol=1e-14, msg=name)


def population(rank):
    """However the batches are dealt, and if a rank has none: the statistics of one process with all of them."""
    batches = clusters()
    group = dist.new_group([0, 1])
    for method in ("joint", "layerwise"):
        single = bn.recalibrate(network(), batches, method=method, process_group=alone(rank))
        for deal in ((batches[:3], batches[3:]), (batches, []), (batches[::2], batches[1::2])):
            for kind in (nn.BatchNorm1d, bn.BatchNorm1d):
                model = bn.recalibrate(network(kind), deal[rank], method=method, process_group=group)
                equal(model, single)
                assert bn.replicas_agree(model)
    wide, halves = clusters(), [[batch[:4] for batch in clusters()], [batch[4:] for batch in clusters()]]
    for method in ("joint", "layerwise"):
        single = bn.recalibrate(network(), wide, method=method, process_group=alone(rank))
        model = bn.synchronize(network())
        equal(bn.recalibrate(model, halves[rank], method=method), single)
        assert model[1].reducer is not None
    uneven = bn.synchronize(network())
    equal(
        bn.recalibrate(uneven, [wide[0]] * (1 + rank), method="layerwise"),
        bn.recalibrate(network(), [wide[0]] * (1 + rank), method="layerwise"),
    )
    masks(rank)
    model = network()
    before = state(model)
    with pytest.raises(InputError, match="at least one batch"):
        bn.recalibrate(model, [])
    with pytest.raises(InputError, match="two values"):
        bn.recalibrate(model, [torch.randn(1, 3).double()][rank:])
    same(before, state(model))


GROUPS = {}


def alone(rank):
    """A group of this rank only."""
    if not GROUPS:
        GROUPS.update({other: dist.new_group([other]) for other in range(2)})
    return GROUPS[rank]


def masks(rank):
    """Masked values count nowhere, and a layer that one rank never calls gets what the other saw."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.sometimes = bn.BatchNorm1d(3), bn.BatchNorm1d(3)

        def forward(self, x, mask):
            return self.sometimes(self.always(x, mask=mask), mask=mask) if rank == 0 else self.always(x, mask=mask)

    x = torch.randn(8, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mask = x[:, 0] > 0
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    model = bn.recalibrate(Sometimes().double(), [{"x": x[mine], "mask": mask[mine]}], method="layerwise")
    values = x.movedim(1, -1)[mask]
    torch.testing.assert_close(model.always.running_mean, values.mean(0))
    torch.testing.assert_close(model.always.running_var, values.var(0))
    seen = (x[:3].movedim(1, -1)[mask[:3]] - values.mean(0)) / (values.var(0) + 1e-5).sqrt()
    torch.testing.assert_close(model.sometimes.running_mean, seen.mean(0))
    torch.testing.assert_close(model.sometimes.running_var, seen.var(0))


def averaged(rank):
    """The pooled moments, where momentum=None makes every rank's statistics those of all its batches."""
    data = [torch.randn(6, 8, 3).double() + 3, torch.randn(2, 8, 3).double() - 5]
    for value in data:
        dist.broadcast(value, 0)
    for kind in (nn.BatchNorm1d, bn.BatchNorm1d):
        model = nn.Sequential(
            kind(3, momentum=None), kind(3, affine=False), kind(3, track_running_stats=False)
        ).double()
        for batch in data[rank]:
            model[0](batch)
        assert bn.average_buffers(model) is model
        batches = torch.cat(data)  # 8 of 8, each with a mean and an unbiased variance
        within, means = batches.var(1), torch.stack([value.flatten(0, 1).mean(0) for value in data])
        mean = batches.flatten(0, 1).mean(0)
        weights = torch.tensor([6 / 8, 2 / 8], dtype=torch.float64)
        variance = within.mean(0) + (weights[:, None] * (means - mean).square()).sum(0)
        torch.testing.assert_close(model[0].running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model[0].running_var, variance, rtol=1e-12, atol=1e-12)
        assert model[0].num_batches_tracked == 6
        assert model[1].running_var.eq(1).all()  # nobody saw a batch
        assert bn.replicas_agree(model)
    alike = bn.BatchNorm1d(2)
    for _ in range(400):
        alike(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) + 10 * rank)
    frozen = bn.freeze(copy.deepcopy(alike))
    before = alike.running_var.clone()
    bn.average_buffers(nn.ModuleList([alike, frozen]))
    torch.testing.assert_close(alike.running_mean, torch.full((2,), 5.0))
    torch.testing.assert_close(alike.running_var, before + 25)
    torch.testing.assert_close(frozen.running_var, before)
    fresh = bn.BatchNorm1d(2)
    if rank == 1:
        fresh(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    wanted = fresh.running_var.clone()
    dist.broadcast(wanted, 1)
    bn.average_buffers(fresh)
    torch.testing.assert_close(fresh.running_var, wanted)  # a rank without data weighs nothing


def shared_data(*shapes):
    data = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for value in data:
        dist.broadcast(value, 0)
    return data


def averaged_domains(rank):
    """Each domain by its own batches, here all of them, whichever source uses it; the counters too."""
    data = dict(zip(("real", "fake"), shared_data((2, 3, 8, 3), (2, 2, 8, 3)), strict=True))  # rank, batch, N, C
    for within in (None, Renorm(warmup=50), MovingAverage(4)):
        layer = bn.BatchNorm1d(3, momentum=None, dtype=torch.float64, statistics=Domains(("real", "fake"), within))
        for name, batches in data.items():
            with bn.domain(name):
                for batch in batches[rank] + 5 * rank:
                    layer(batch)
        if rank == 1:
            layer(torch.full((4, 3), float("nan"), dtype=torch.float64))
        bn.average_buffers(layer)
        for name, batches in data.items():
            suffix = "" if name == "real" else "_fake"
            both = batches + 5 * torch.arange(2.0).view(2, 1, 1, 1)
            means = both.flatten(1, 2).mean(1)  # (W, C)
            found = {
                key: getattr(layer, key + suffix) for key in ("running_mean", "running_var", "num_batches_tracked")
            }
            torch.testing.assert_close(found["running_mean"], means.mean(0), rtol=1e-12, atol=1e-12)
            variance = both.flatten(0, 1).var(1).mean(0) + means.var(0, correction=0)
            torch.testing.assert_close(found["running_var"], variance, rtol=1e-12, atol=1e-12)
            assert found["num_batches_tracked"] == batches.shape[1]
        assert layer.num_nonfinite_batches == 1
        assert bn.replicas_agree(layer)


def averaged_windows(rank):
    """A row of a window becomes that of the replicas' batches as one; a row that one replica alone has is that replica's."""
    first, second, gradient = shared_data((2, 8, 3), (8, 3), (2, 8, 3))
    source = MovingAverage(4, warmup=0)
    for statistics, suffix in ((source, ""), (Domains(("real", "fake"), source), "_fake")):
        layer = bn.BatchNorm1d(3, dtype=torch.float64, statistics=statistics)
        with bn.domain("fake"):
            x = (first[rank] + 5 * rank).requires_grad_()
            y = layer(x)
            if rank == 0 or suffix:
                y.backward(gradient[rank])
            own = getattr(layer, f"running_mean_gradient{suffix}")[0].clone()
            if rank == 1:
                layer(second)
        bn.average_buffers(layer)
        window = {
            key: getattr(layer, f"running_{key}{suffix}") for key in ("mean_window", "var_window", "mean_gradient")
        }
        together = torch.cat([first[0], first[1] + 5])
        torch.testing.assert_close(window["mean_window"][0], together.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(window["var_window"][0], together.var(0, correction=0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(window["mean_window"][1], second.mean(0), rtol=1e-12, atol=1e-12)
        assert window["mean_window"][2:].eq(0).all()  # as they began
        assert window["var_window"][2:].eq(1).all()
        dist.all_reduce(own)  # of both ranks, or of the first alone
        torch.testing.assert_close(window["mean_gradient"][0], own / (2 if suffix else 1), rtol=1e-12, atol=1e-12)
        assert bn.replicas_agree(layer)
        before = {name: value.clone() for name, value in layer.named_buffers()}
        bn.average_buffers(layer)
        assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


class Twice:
    """A source of somebody else's, which keeps what it likes."""

    def __call__(self, layer, x, residual, mask):
        return Batch()(layer, x, residual, mask)

    def layer_buffers(self):
        names = ("running_mean", "running_var", "num_batches_tracked")
        return {f"{name}_again": SourceBuffer(name) for name in names} | {
            "running_mean_rows": SourceBuffer("running_mean", 2)
        }


def averaged_sources_of_others(rank):
    layer = bn.BatchNorm1d(2, statistics=Twice())
    layer.running_mean_again.fill_(3.0 * rank)
    layer.running_mean_rows.fill_(7.0 * rank)
    layer.num_batches_tracked_again.fill_(rank)
    layer.running_var.fill_(-0.0 if rank else 0.0)  # alike but for a bit
    bn.average_buffers(layer)
    assert bn.replicas_agree(layer)
    assert layer.running_mean_again.eq(3).all()  # the first rank's has seen nothing
    assert layer.num_batches_tracked_again == 1
    assert layer.running_mean_rows.eq(3.5).all()


def agree(rank):
    model = network()
    agreement = bn.replicas_agree(model)
    assert agreement
    assert str(agreement) == "all replicas agree"
    with torch.no_grad():
        model[0].weight[1, 2] += 0.25 * rank
        model[4].running_var[0] = 1 + torch.finfo(torch.float64).eps * rank  # one bit
        model[7].num_batches_tracked += rank
    agreement = bn.replicas_agree(model)
    assert not agreement
    assert [(one.name, one.ranks) for one in agreement.differences] == [
        ("0.weight", (1,)),
        ("4.running_var", (1,)),
        ("7.num_batches_tracked", (1,)),
    ]
    assert agreement.differences[0].largest == pytest.approx(0.25)
    assert "0.weight: ranks [1] differ from the first, by up to 0.25" in str(agreement)
    with pytest.raises(ReplicaError, match=r"those of ranks \[1\] differ from rank 0"):
        bn.replicas_agree(nn.Linear(3, 2 + rank))
    with pytest.raises(ArgumentError):
        bn.replicas_agree(3)


def failing_loader(rank):
    """One rank's data fail: it raises what failed, the other stops within the group's timeout, and both are as they were."""

    def batches():
        yield torch.randn(4, 3, dtype=torch.float64)
        if rank == 1:
            raise OSError("a file is gone")

    group = impatient(3)
    model = nn.Sequential(bn.BatchNorm1d(3, dtype=torch.float64), bn.BatchNorm1d(3, dtype=torch.float64))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OSError if rank == 1 else ReplicaError, match="a file is gone" if rank == 1 else "recalibrate"):
        bn.recalibrate(model, batches(), process_group=group)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def everything(rank, size):
    population(rank)
    averaged(rank)
    averaged_domains(rank)
    averaged_windows(rank)
    averaged_sources_of_others(rank)
    agree(rank)
    failing_loader(rank)


def test_ranks():
    on_replicas(everything, 2)


def test_without_torch_distributed():
    for function in (bn.average_buffers, bn.replicas_agree):
        with pytest.raises(StateError, match="initialized"):
            function(bn.BatchNorm1d(3))
