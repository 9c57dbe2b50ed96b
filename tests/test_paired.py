"""Pairs: what a network can read off batch statistics about who belongs to whom, and that it cannot after `jointly` and `shuffled`."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.statistics import Ghost
from tests.replicas import on_replicas

W, N, TRIALS = 2, 32, 200


def share_of_ones(z, x):
    """What a normalized value of 0 or 1 says about its batch, whose share p of ones it contains: z² is p/(1-p) or (1-p)/p."""
    square = z.square()
    return torch.where(x > 0.5, 1 / (1 + square), square / (1 + square))


def views(trial):
    """(W * N, 1): images that are 0 or 1, so that no image says more than a bit; both views of an image are alike."""
    return torch.bernoulli(torch.full((W * N, 1), 0.5), generator=torch.Generator().manual_seed(trial)).double()


def encoder():
    """A batch norm in which each group of N samples is normalized as on a replica of its own."""
    return bn.BatchNorm1d(1, eps=1e-12, affine=False, dtype=torch.float64, statistics=Ghost(N))


def read_off(query, key, x):
    """How often the batch of a query is the one whose share of ones fits the key better: the label of the contrastive loss."""
    shares = share_of_ones(query, x).view(W, N).mean(1)  # of each replica, to rounding the same for all of its queries
    if (shares[0] - shares[1]).abs() < 1e-6:
        return None
    guessed = (share_of_ones(key, x).view(-1, 1) - shares).abs().argmin(1)
    return guessed.eq(torch.arange(W).repeat_interleave(N)).double().mean().item()


def test_the_replica_of_a_pair_can_be_read_off_the_keys_unless_they_are_shuffled():
    torch.manual_seed(0)
    plain, shuffled = [], []
    for trial in range(TRIALS):
        x = views(trial)
        query = encoder()(x)
        found = read_off(query, encoder()(x), x), read_off(query, bn.shuffled(encoder(), x), x)
        if found[0] is not None:
            plain.append(found[0])
            shuffled.append(found[1])
    assert len(plain) > TRIALS / 2
    assert plain == [1.0] * len(plain)
    assert abs(sum(shuffled) / len(shuffled) - 0.5) < 0.05


def test_the_batch_of_a_sample_can_be_read_off_unless_batches_are_forwarded_jointly():
    """Equal samples of two batches get different outputs in separate forwards, and equal ones in a joint forward."""
    positive, negative = torch.zeros(8, 1).double(), torch.zeros(12, 1).double()
    positive[:2], negative[:7] = 1, 1
    layer = bn.BatchNorm1d(1, affine=False, dtype=torch.float64)
    apart = layer(positive), layer(negative)
    together = bn.jointly(layer, positive, negative)
    assert not torch.isclose(apart[0][0], apart[1][0])
    assert torch.equal(together[0][0], together[1][0])
    assert torch.equal(together[0][-1], together[1][-1])
    whole = torch.cat([positive, negative])
    wanted = (whole - whole.mean()) / (whole.var(correction=0) + layer.eps).sqrt()
    torch.testing.assert_close(torch.cat(together), wanted, rtol=1e-12, atol=1e-12)


def test_jointly_takes_several_arguments_and_returns_nests():
    layer = bn.BatchNorm1d(2, dtype=torch.float64)

    def forward(states, actions):
        y = layer(torch.cat([states, actions], 1))
        return {"values": y, "pair": (y.sum(1), y[:, :1])}

    parts = [(torch.randn(n, 1).double(), torch.randn(n, 1).double()) for n in (3, 5, 2)]
    found = bn.jointly(forward, *parts)
    wanted = forward(*(torch.cat(each) for each in zip(*parts, strict=True)))
    assert [each["values"].shape[0] for each in found] == [3, 5, 2]
    torch.testing.assert_close(torch.cat([each["values"] for each in found]), wanted["values"])
    torch.testing.assert_close(torch.cat([each["pair"][0] for each in found]), wanted["pair"][0])


class Twins(nn.Module):
    """Two critics of states and actions, as in CrossQ."""

    def __init__(self):
        super().__init__()
        self.critics = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), bn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
            for _ in range(2)
        )
        self.drop = nn.Dropout(0.5)

    def forward(self, states, actions):
        x = torch.cat([states, actions], 1)
        return tuple(critic(x) for critic in self.critics)


def test_joint_values_are_those_of_crossq_and_modes_come_back():
    torch.manual_seed(0)
    twins = Twins().double().eval()
    now, later = [(torch.randn(n, 2).double(), torch.randn(n, 1).double() + n) for n in (6, 6)]
    twins.critics[1][0].train()
    written_out = copy.deepcopy(twins).train()
    values, next_values = bn.joint_values(twins, now, later)
    both = written_out(*(torch.cat(each) for each in zip(now, later, strict=True)))
    for found, found_later, wanted in zip(values, next_values, both, strict=True):
        torch.testing.assert_close(torch.cat([found, found_later]), wanted)
        assert found.requires_grad
        assert not found_later.requires_grad
    torch.testing.assert_close(twins.state_dict(), written_out.state_dict())  # running statistics of both, once
    assert [each.training for each in (twins, *twins.critics[0], twins.critics[1][0], twins.critics[1][2])] == [
        *[False] * 6, True, False,
    ]  # fmt: skip
    sum(((value - 1 - 0.99 * after) ** 2).mean() for value, after in zip(values, next_values, strict=True)).backward()
    reference = [((a[:6] - 1 - 0.99 * a[6:].detach()) ** 2).mean() for a in both]
    sum(reference).backward()
    for found, wanted in zip(twins.parameters(), written_out.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ((), InputError, "at least one batch, but got none"),
        ((torch.zeros(3, 1), [1.0]), ArgumentError, "a tensor or a tuple of tensors, but got list"),
        ((torch.tensor(1.0),), InputError, r"on their first axis, but got \(\)"),
        (((),), InputError, "on their first axis, but got none"),
        (((torch.zeros(3, 1), torch.zeros(2, 1)),), InputError, r"but got \(3, 1\), \(2, 1\)"),
        (((torch.zeros(3, 1),), (torch.zeros(3, 1), torch.zeros(3, 1))), InputError, "but they have 1, 2"),
    ],
)
def test_jointly_refuses(batches, error, message):
    with pytest.raises(error, match=message):
        bn.jointly(nn.Identity(), *batches)


def test_outputs_need_a_row_for_each_sample():
    x = torch.zeros(3, 1)
    with pytest.raises(InputError, match=r"a row for each of 6 samples, but got \(\)"):
        bn.jointly(torch.sum, x, x)
    with pytest.raises(InputError, match="but got float"):
        bn.jointly(lambda _: 1.0, x, x)
    with pytest.raises(InputError, match=r"a row for each of 3 samples, but returned \(\)"):
        bn.shuffled(torch.sum, x)
    with pytest.raises(InputError, match="but returned tuple"):
        bn.shuffled(lambda x: (x, x), x)
    with pytest.raises(ArgumentError, match="batch must be a tensor, but got list"):
        bn.shuffled(nn.Identity(), [1.0])


def test_shuffled_returns_rows_in_order_and_gradients_to_them():
    x = torch.randn(7, 3, requires_grad=True)
    y = bn.shuffled(lambda rows: 2 * rows, x)
    torch.testing.assert_close(y, 2 * x, rtol=0, atol=0)
    weights = torch.arange(7.0).unsqueeze(1)
    (weights * y).sum().backward()
    torch.testing.assert_close(x.grad, 2 * weights.expand(7, 3))
    seen = []
    bn.shuffled(lambda rows: seen.append(rows) or rows, x)
    assert not torch.equal(seen[0], x)


def test_the_modes_of_batch_norms_alone_change_and_come_back():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), bn.BatchNorm1d(2))
    model[2].eval()

    def fail():
        with bn.training_mode(model, False):
            assert [each.training for each in model] == [False, True, False]
            with bn.training_mode(model, True):
                assert [each.training for each in model] == [True, True, True]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [each.training for each in model] == [True, True, False]


def shuffling(rank, size):
    """As one process that has all rows, drawn with the seed of the first rank."""
    generator = torch.Generator().manual_seed(7)
    everything = torch.randn(size * 4, 3, dtype=torch.float64, generator=generator)
    weights = torch.randn(size * 4, 3, dtype=torch.float64, generator=generator)
    single = bn.BatchNorm1d(3, dtype=torch.float64, statistics=Ghost(4))
    layer = bn.BatchNorm1d(3, dtype=torch.float64)
    torch.manual_seed(3 + rank)
    own = slice(rank * 4, (rank + 1) * 4)
    x = everything[own].clone().requires_grad_()
    y = bn.shuffled(layer, x)
    (y * weights[own]).sum().backward()

    torch.manual_seed(3)  # of the first rank
    seed = int(torch.randint(2**62, ()))
    order = torch.randperm(size * 4, generator=torch.Generator().manual_seed(seed))
    whole = everything.clone().requires_grad_()
    wanted = single(whole[order])[order.argsort()]
    (wanted * weights).sum().backward()
    torch.testing.assert_close(y, wanted[own], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, whole.grad[own], rtol=1e-9, atol=1e-12)
    total = layer.weight.grad.clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, single.weight.grad, rtol=1e-9, atol=1e-12)


def leaking(rank, size):
    """The test above, with a replica in place of each group."""
    torch.manual_seed(rank)
    layer = bn.BatchNorm1d(1, eps=1e-12, affine=False, dtype=torch.float64)
    counted = {"plain": [], "shuffled": []}
    for trial in range(60):
        x = views(trial)
        own = x[rank * N : (rank + 1) * N]
        query = layer(own)
        for name, key in (("plain", layer(own)), ("shuffled", bn.shuffled(layer, own))):
            rows = [[torch.empty_like(own) for _ in range(size)] for _ in range(2)]
            dist.all_gather(rows[0], query)
            dist.all_gather(rows[1], key)
            found = read_off(torch.cat(rows[0]), torch.cat(rows[1]), x)
            if found is not None:
                counted[name].append(found)
    assert counted["plain"] == [1.0] * len(counted["plain"])
    assert len(counted["plain"]) > 30
    assert abs(sum(counted["shuffled"]) / len(counted["shuffled"]) - 0.5) < 0.1


def refusing(rank, size):
    with pytest.raises(InputError, match=r"ranks \[0, 1\] passed \[2, 3\]; drop the incomplete last batch"):
        bn.shuffled(nn.Identity(), torch.zeros(2 + rank, 1))
    groups = [dist.new_group([other]) for other in range(size)]
    x = torch.randn(3, 2)
    assert torch.equal(bn.shuffled(nn.Identity(), x, process_group=groups[rank]), x)
    with pytest.raises(StateError, match="must belong to the process group"):
        bn.shuffled(nn.Identity(), x, process_group=groups[1 - rank])


def everything(rank, size):
    shuffling(rank, size)
    leaking(rank, size)
    refusing(rank, size)


def test_over_replicas():
    on_replicas(everything, W)


def test_a_model_may_be_copied_as_before():
    """`training_mode` leaves nothing behind."""
    model = nn.Sequential(bn.BatchNorm1d(2))
    before = dict(vars(model[0]))
    with bn.training_mode(model, False):
        copy.deepcopy(model)
    assert vars(model[0]) == before
