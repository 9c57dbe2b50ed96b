"""Running statistics over the batches between two steps of the optimizer."""

import copy
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import InputError
from batchnorm.statistics import Batch, Domains, Ghost, MovingAverage


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("part", [Batch(), Ghost(2), Domains(("a", "b"))], ids=repr)
def test_running_statistics_are_those_of_one_big_batch(part, momentum):
    layer, big = (bn.BatchNorm1d(3, momentum=momentum, statistics=part, dtype=torch.float64) for _ in range(2))
    x = torch.randn(5, 8, 3, dtype=torch.float64) * 2 + 1
    with bn.accumulate(2):
        for micro in x:
            for piece in micro.split([3, 5]):
                layer(piece)
    for micro in x:
        big(micro)
    torch.testing.assert_close(layer.state_dict(), big.state_dict())


def test_outputs_stay_those_of_each_batch_and_nothing_moves_before_its_time():
    layer, plain = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(4, 3)
    with bn.accumulate(3):
        torch.testing.assert_close(layer(x), plain(x))
        layer(x + 1)
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    big = bn.BatchNorm1d(3)
    big(torch.cat([x, x + 1]))  # what was left over
    torch.testing.assert_close(layer.state_dict(), big.state_dict())
    with pytest.raises(InputError, match="more than 1 value"), bn.accumulate(3):
        [layer(piece) for piece in (x, x[:1])]
    torch.testing.assert_close(layer.state_dict(), big.state_dict())


def test_moving_averages_take_every_batch():
    part = MovingAverage(4, warmup=2)
    layer, alone = (bn.BatchNorm1d(3, statistics=part, dtype=torch.float64) for _ in range(2))
    x = torch.randn(6, 8, 3, dtype=torch.float64)
    with bn.accumulate(2):
        for micro in x:
            layer(micro)
    for micro in x:
        alone(micro)
    torch.testing.assert_close(layer.state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_masked_batches_weigh_what_counts():
    layer, big = (bn.BatchNorm1d(3, dtype=torch.float64) for _ in range(2))
    x, lengths = torch.randn(4, 3, 6, dtype=torch.float64), torch.tensor([6, 1, 3, 2])
    with bn.accumulate(2):
        layer(x[:2], lengths=lengths[:2])
        layer(x[2:], lengths=lengths[2:])
    big(x, lengths=lengths)
    torch.testing.assert_close(layer.state_dict(), big.state_dict())


def test_a_recomputation_counts_once():
    layer, big = bn.BatchNorm1d(3), bn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    with bn.accumulate(2):
        for piece in x.split(4):
            checkpoint(layer, piece.requires_grad_(), use_reentrant=False).square().sum().backward()
    big(x)
    torch.testing.assert_close(layer.state_dict(), big.state_dict())


def test_it_is_one_threads_own_and_ends():
    layer = bn.BatchNorm1d(3)
    with bn.accumulate(2):
        thread = threading.Thread(target=lambda: layer(torch.randn(4, 3)))
        thread.start()
        thread.join()
        assert layer.num_batches_tracked == 1
    layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 2


def test_what_it_refuses():
    with pytest.raises(InputError, match="at least 1"), bn.accumulate(0):
        pass


def test_compiled_code_is_refused_inside_and_runs_outside():
    compiled = torch.compile(layer := bn.BatchNorm1d(3), backend="eager", fullgraph=True)
    with bn.accumulate(2), pytest.raises(Exception, match=r"StateError|accumulate"):
        compiled(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0
    compiled(torch.randn(4, 3))
    assert layer.num_batches_tracked == 1
