"""Blocks as timm, torchvision and others write them: converted, fused, folded, and back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from tests.networks import settle
from tests.test_surgery import shape_of


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a batch norm that also applies its activation."""

    def __init__(self, channels, act=True):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU() if act else nn.Identity()

    def forward(self, x):
        tracked = not self.training or self.track_running_stats
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        mean, variance = (self.running_mean, self.running_var) if tracked else (None, None)
        x = F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


class ConvNormAct(nn.Module):
    def __init__(self, inputs, outputs, size=1, act=True, **options):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)
        self.bn = BatchNormAct2d(outputs, act)

    def forward(self, x):
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.bn, self.expand = nn.Conv2d(channels, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, channels, 1)

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.bn(self.reduce(s)))))


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.8) / 0.8


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection, stochastic depth."""

    def __init__(self, norm_act):
        super().__init__()
        if norm_act:
            self.expand, self.depthwise = ConvNormAct(4, 8), ConvNormAct(8, 8, 3, groups=8)
        else:
            self.expand = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
            self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.se, self.project = SqueezeExcite(8), nn.Conv2d(8, 4, 1, bias=False)
        self.bn, self.drop_path = nn.BatchNorm2d(4), DropPath()

    def forward(self, x):
        y = self.se(self.depthwise(self.expand(x)))
        return self.drop_path(self.bn(self.project(y))) + x


class DenseLayer(nn.Module):
    """DenseNet's: normalized, activated, convolved, and put beside its input."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x), inplace=True)))))
        return torch.cat([x, y], 1)


class Inception(nn.Module):
    """Branches put beside each other, one batch norm for all; another before them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(9)
        self.small, self.pooled = (
            nn.Conv2d(4, 3, 1),
            nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.Conv2d(4, 2, 1)),
        )
        self.deep = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x):
        x = self.first(x)
        return F.leaky_relu(self.last(torch.cat([self.small(x), self.pooled(x), self.deep(x)], dim=1)), 0.1)


class MobileOne(nn.Module):
    """Several branches of each size beside an identity, all depthwise."""

    def __init__(self):
        super().__init__()
        sizes = (3, 3, 3, 1)
        convolutions = [nn.Conv2d(4, 4, size, padding=size // 2, groups=4, bias=False) for size in sizes]
        self.branches = nn.ModuleList(nn.Sequential(convolution, nn.BatchNorm2d(4)) for convolution in convolutions)
        self.identity = nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.identity(x)
        for branch in self.branches:
            out += branch(x)
        return F.gelu(out)


class Classifier(nn.Module):
    """Pooled, normalized, classified."""

    def __init__(self):
        super().__init__()
        self.pool, self.norm, self.head = nn.AdaptiveAvgPool2d(1), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(torch.flatten(self.pool(x), 1)))


# What is left of batch norms when folded, and how many pairs of branches become one.
BLOCKS = {
    "norm-act": (lambda: InvertedResidual(True), 0, 0),
    "inverted": (lambda: InvertedResidual(False), 0, 0),
    "dense": (DenseLayer, 1, 0),
    "inception": (Inception, 0, 0),
    "mobile-one": (MobileOne, 0, 1),
    "classifier": (Classifier, 0, 0),
    "together": (
        lambda: nn.Sequential(InvertedResidual(False), MobileOne(), InvertedResidual(True), Classifier()),
        0,
        1,
    ),
}


def sample():
    return torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(model):
    torch.manual_seed(9)
    x = sample().requires_grad_()
    y = model.train()(x)
    y.square().sum().backward()
    return y, x.grad, [value.grad for value in model.parameters()]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("surgery", [bn.convert, bn.fuse, bn.freeze], ids=lambda surgery: surgery.__name__)
def test_there_and_back(name, surgery):
    torch.manual_seed(0)
    model = settle(BLOCKS[name][0]()).double()
    expected = copy.deepcopy(model)
    before, state = shape_of(model), copy.deepcopy(model.state_dict())
    surgery(model)
    if surgery is bn.freeze:
        bn.unfreeze(model)
    torch.testing.assert_close(trained(model), trained(expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-10, atol=1e-10)
    model.load_state_dict(state)
    bn.revert(model)
    assert shape_of(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    "surgery", [lambda model: model, bn.convert, bn.fuse, bn.freeze], ids=["as-is", "convert", "fuse", "freeze"]
)
def test_folded(name, surgery, monkeypatch):
    monkeypatch.setattr(bn.folding, "_SECONDS", 0.0)
    torch.manual_seed(0)
    build, left, merged = BLOCKS[name]
    model = settle(build()).double().eval()
    expected = copy.deepcopy(model)
    found, report = bn.fold(surgery(model), sample(), tolerance=1e-10)
    assert (report.batch_norms_after, len(report.merged)) == (left, merged), str(report)
    assert not report.untraced
    other = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(found(other), expected(other), rtol=1e-10, atol=1e-10)
