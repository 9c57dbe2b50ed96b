"""Moving average batch normalization, against the paper's formulas in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.errors import DTypeError, InputError, StateError
from batchnorm.statistics import MovingAverage
from tests.budget import assert_same_bits


class Yan2020:
    """Sections 4.1 and 4.2: averages of the last m batches in place of the batch's, forward and backward; lists, float64."""

    def __init__(self, part: MovingAverage, momentum: float, eps: float) -> None:
        self.part, self.momentum, self.eps = part, momentum, eps
        self.running_mean, self.running_var = torch.zeros(3).double(), torch.ones(3).double()
        self.mean, self.square, self.g, self.gz = [], [], [], []

    def average(self, history, value):
        m = self.part.window
        history.append(value)
        enough = len(history) > max(m, self.part.warmup)
        return torch.stack(history[-m:]).mean(0) if enough else value

    def step(self, x, gamma, beta, dy):
        axes, along = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        mean = self.average(self.mean, x.mean(axes))
        if self.part.centered:
            mean = torch.zeros(3).double()
        square = self.average(self.square, (x**2).mean(axes))
        variance = square - mean**2
        sigma = torch.sqrt(variance + self.eps)
        r = torch.ones(3).double()
        if len(self.mean) > max(self.part.window, self.part.warmup):
            r = torch.clamp(sigma / torch.sqrt(self.running_var + self.eps), 1 / self.part.r_max, self.part.r_max)
        z = (x - mean.view(along)) / sigma.view(along)
        y = (gamma * r).view(along) * z + beta.view(along)
        g = dy * (gamma * r).view(along)
        mean_g, mean_gz = self.average(self.g, g.mean(axes)), self.average(self.gz, (g * z).mean(axes))
        if self.part.centered:
            mean_g = torch.zeros(3).double()
        dx = (g - mean_g.view(along) - z * mean_gz.view(along)) / sigma.view(along)
        self.running_mean = self.running_mean + self.momentum * (mean - self.running_mean)
        self.running_var = self.running_var + self.momentum * (variance - self.running_var)
        return y, dx, (dy * z * r.view(along)).sum(axes), dy.sum(axes)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4), (2, 3, 4, 2)], ids=str)
def test_moving_average_is_the_papers(shape, warmup, centered):
    part = MovingAverage(window=4, r_max=1.5, warmup=warmup, centered=centered)
    layer = bn.BatchNorm(3, eps=1e-3, dtype=torch.float64, statistics=part, running_variance="biased")
    layer.weight.data.uniform_(0.5, 1.5)
    layer.bias.data.uniform_(-1, 1)
    paper = Yan2020(part, 0.1, 1e-3)
    for step in range(12):
        x = (torch.randn(shape, dtype=torch.float64) * (1 + step % 3) + step / 4).requires_grad_()
        dy = torch.randn_like(x)
        y = layer(x)
        grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
        with torch.no_grad():
            exact, *exact_grads = paper.step(x, layer.weight, layer.bias, dy)
        torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(list(grads), exact_grads, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close((layer.running_mean, layer.running_var), (paper.running_mean, paper.running_var))


def test_warming_up_is_plain():
    layer, plain = bn.BatchNorm2d(3, statistics=MovingAverage()), bn.BatchNorm2d(3)
    for _ in range(3):
        x = (torch.randn(4, 3, 5, 2) * 3 + 1).requires_grad_()
        y, expected, dy = layer(x), plain(x), torch.randn(4, 3, 5, 2)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))
        for name in plain.state_dict():
            torch.testing.assert_close(layer.state_dict()[name], plain.state_dict()[name])


@pytest.mark.parametrize("centered", [False, True])
def test_padding_changes_nothing(centered):
    part = MovingAverage(window=2, warmup=0, centered=centered)
    one, other = (bn.BatchNorm1d(3, statistics=part, activation="relu", dtype=torch.float64) for _ in range(2))
    for _ in range(5):
        x, mask = torch.randn(4, 3, 6, dtype=torch.float64), torch.arange(6) < torch.tensor([6, 2, 1, 4]).unsqueeze(1)
        padded = x.masked_fill(~mask.unsqueeze(1), torch.nan).requires_grad_()
        alone = x.movedim(1, -1)[mask].requires_grad_()
        y, expected = one(padded, mask=mask), other(alone)
        torch.testing.assert_close(y.movedim(1, -1)[mask], expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(padded.grad.movedim(1, -1)[mask], alone.grad)
        assert not padded.grad.movedim(1, -1)[~mask].any()
    torch.testing.assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_is_the_same_and_moves_nothing(reentrant):
    one = bn.BatchNorm1d(3, statistics=MovingAverage(window=2, warmup=0, r_max=1.0))
    other = copy.deepcopy(one)
    for _ in range(5):
        x = torch.randn(4, 3)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        one(a).square().sum().backward()
        checkpoint(other, b, use_reentrant=reentrant).square().sum().backward()
        assert_same_bits("dx", b.grad, a.grad)
    torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)


def test_a_broken_batch_leaves_the_windows_alone():
    layer = bn.BatchNorm1d(3, statistics=MovingAverage(window=2, warmup=0))
    for _ in range(3):
        layer(torch.randn(4, 3).requires_grad_()).square().sum().backward()
    before = copy.deepcopy(layer.state_dict())
    broken = torch.randn(4, 3)
    broken[0] = torch.nan
    layer(broken.requires_grad_()).square().sum().backward()
    assert layer.num_nonfinite_batches == 1
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_checkpoints_revert_and_lazy_layers():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    plain = copy.deepcopy(model.state_dict())
    bn.convert(model, statistics=MovingAverage(window=2))
    assert model[0].running_mean_window.shape == (2, 3)
    model.load_state_dict(plain)
    bn.revert(model).load_state_dict(plain)
    lazy = bn.LazyBatchNorm1d(statistics=MovingAverage(window=2))
    lazy(torch.randn(4, 3))
    assert lazy.running_var_window.shape == (2, 3)
    lazy.reset_running_stats()
    assert torch.equal(lazy.running_var_window, torch.ones(2, 3))


def test_what_it_refuses():
    with pytest.raises(InputError, match="window and r_max"):
        MovingAverage(window=0)
    part = MovingAverage()
    with pytest.raises(StateError, match="track_running_stats=True"):
        bn.BatchNorm1d(3, track_running_stats=False, statistics=part)(torch.randn(4, 3))
    with pytest.raises(DTypeError, match="real input"):
        bn.BatchNorm1d(3, dtype=torch.complex64, statistics=part)(torch.randn(4, 3, dtype=torch.complex64))
    with pytest.raises(StateError, match=r"torch\.func"):
        torch.func.grad(lambda x: bn.BatchNorm1d(3, statistics=part)(x).sum())(torch.randn(4, 3))


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_in_one_graph(backend, centered):
    """Forward, gradients and the windows that the backward writes, through warmup and after it."""
    torch.manual_seed(0)
    part = MovingAverage(window=2, warmup=3, centered=centered)
    eager = nn.Sequential(
        nn.Linear(4, 5), bn.BatchNorm(5, statistics=part, activation="relu"), nn.Linear(5, 4)
    ).double()
    compiled = copy.deepcopy(eager)
    program = torch.compile(compiled, fullgraph=True, backend=backend)
    for _ in range(6):
        x = torch.randn(6, 4, dtype=torch.float64)
        values = []
        for call in (eager, program):
            y = call(x)
            y.sin().sum().backward()
            values.append(y)
        torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=1e-12)
    assert eager[1].get_buffer("running_var_gradient").abs().min() > 0
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["convert", "load", "lazy", "copy"])
def test_windows_of_a_trained_layer_begin_with_what_it_knows(way):
    plain = nn.BatchNorm1d(3)
    for _ in range(100):
        plain(torch.randn(8, 3) + 40)
    part = MovingAverage(window=4, warmup=0)
    match way:
        case "convert":
            layer = bn.convert(copy.deepcopy(plain), statistics=part)
        case "load" | "copy":
            layer = bn.BatchNorm1d(3, statistics=part)
            layer.load_state_dict(plain.state_dict()) if way == "load" else bn.copy_statistics(plain, layer)
        case _:
            layer = bn.LazyBatchNorm1d(statistics=part)
            layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.running_mean_window, plain.running_mean.expand(4, 3))
    assert torch.equal(layer.running_var_window, plain.running_var.expand(4, 3))
    assert not layer.running_mean_gradient.any()  # a mean of 40 is no gradient
    assert not layer.running_var_gradient.any()
    x = (torch.randn(8, 3) + 40).requires_grad_()
    layer(x).backward(torch.ones(8, 3))
    assert x.grad.abs().max() < 2


def test_windows_of_another_size_begin_anew():
    source = bn.BatchNorm1d(3, statistics=MovingAverage(window=4))
    for _ in range(5):
        source(torch.randn(8, 3) + 40)
    for part in (MovingAverage(window=2), MovingAverage(window=9)):
        loaded, copied = bn.BatchNorm1d(3, statistics=part), bn.BatchNorm1d(3, statistics=part)
        loaded.load_state_dict(source.state_dict())
        bn.copy_statistics(source, copied)
        assert torch.equal(loaded.running_mean_window, source.running_mean.expand(part.window, 3))
        assert torch.equal(copied.running_mean_window, loaded.running_mean_window)
        assert torch.equal(copied.running_mean, source.running_mean)


@pytest.mark.parametrize("centered", [False, True])
def test_a_batch_of_which_one_value_counts_moves_no_window(centered):
    layer = bn.BatchNorm1d(3, statistics=MovingAverage(window=2, warmup=0, centered=centered))
    for _ in range(3):
        layer(torch.randn(4, 3, 5)).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    for counting in (0, 1):
        mask = torch.arange(20).view(4, 5) < counting
        layer(torch.randn(4, 3, 5, requires_grad=True), mask=mask).square().sum().backward()
    layer(torch.zeros(0, 3, 5, requires_grad=True)).sum().backward()
    layer(torch.zeros(4, 3, 0, requires_grad=True)).sum().backward()
    assert_same_state(layer, before)


def assert_same_state(layer, state):
    torch.testing.assert_close(dict(layer.state_dict()), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_goes_by_what_its_forward_went_by(reentrant, centered):
    part = MovingAverage(window=3, r_max=2.0, warmup=0, centered=centered)
    plain = bn.BatchNorm1d(3, statistics=part)
    checkpointed = copy.deepcopy(plain)
    for _ in range(
        6
    ):  # two forwards, then the backward of both: the second has moved windows, counter and running statistics
        outputs, gradients = [], []
        inputs = torch.randn(8, 3, 4) + 1, torch.randn(8, 3, 4) * 2
        for run in (plain, lambda x: checkpoint(checkpointed, x, use_reentrant=reentrant)):
            leaves = [x.clone().requires_grad_() for x in inputs]
            results = [run(x) for x in leaves]
            for y in results:
                y.pow(3).sum().backward()
            outputs.append(torch.stack(results))
            gradients.append(torch.stack([x.grad for x in leaves]))
        assert torch.equal(*outputs)
        assert torch.equal(*gradients)
        assert_same_state(checkpointed, plain.state_dict())
    assert torch.equal(checkpointed.weight.grad, plain.weight.grad)


def test_forwards_without_a_backward_leave_no_zeros_in_the_averages_of_the_gradient():
    every, half = (bn.BatchNorm1d(3, statistics=MovingAverage(window=size, warmup=0, r_max=1.0)) for size in (2, 4))
    for _ in range(6):
        x, dy = torch.randn(8, 3), torch.randn(8, 3)
        with torch.no_grad():
            half(x)  # which takes a row of each window, and gives none to the gradient's
        found = []
        for layer in (every, half):
            leaf = x.clone().requires_grad_()
            layer(leaf).backward(dy)
            found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_the_first_gradient_of_a_trained_layer_is_averaged_over_itself():
    plain = nn.BatchNorm1d(3)
    x, dy = torch.randn(8, 3), torch.randn(8, 3)
    for _ in range(200):
        plain(x)
    layer = bn.convert(copy.deepcopy(plain), statistics=MovingAverage(window=4, warmup=0))
    found = []
    for run in (layer, plain):
        leaf = x.clone().requires_grad_()
        run(leaf).backward(dy)
        found.append(leaf.grad)
    torch.testing.assert_close(*found, rtol=0.2, atol=0.1)
