"""Leaving batch norm behind: the formulas of the alternatives, what carries over, what stays and why, and the way back."""

import copy
import logging
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.errors import ArgumentError, InputError
from batchnorm.statistics import Ghost
from batchnorm.surgery.alternatives import Affine, Alternative
from batchnorm.surgery.standardized import EPS, standardized
from tests.networks import FrozenBatchNorm2d, settle
from tests.test_surgery import shape_of

KINDS = ("group", "layer", "instance", "none")


class BatchNormAct(nn.BatchNorm2d):
    """As timm's: it normalizes, then calls its submodules."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def network():
    torch.manual_seed(5)
    return settle(
        nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 1), BatchNormAct(24)),
            *(nn.Conv2d(24, 24, 3, groups=24), nn.BatchNorm2d(24, affine=False, eps=1e-3)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 16), nn.BatchNorm1d(16)),
        )
    )


def sample():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(6))


def by_formula(x, groups, layer):
    """Equations 1, 2 and 7 of Wu & He 2018 (arXiv:1803.08494), value by value of a group: (N, C, *S)."""
    y = torch.empty_like(x)
    N, C = x.shape[:2]
    for n in range(N):
        for chosen in torch.arange(C).split(C // groups):
            values = x[n, chosen]
            mean = values.sum() / values.numel()
            sigma = ((values - mean).square().sum() / values.numel() + layer.eps).sqrt()
            y[n, chosen] = (values - mean) / sigma
    shape = (C, *[1] * (x.dim() - 2))
    return y * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("to", "groups", "C", "S"),
    [("group", 2, 16, (5, 3)), ("group", 3, 24, ()), ("group", 1, 13, (4,)), ("layer", 1, 6, (5, 3)), ("layer", 1, 6, ()),
     ("instance", 6, 6, (5, 3)), ("instance", 6, 6, (2, 3, 2))],
)  # fmt: skip
def test_the_formula_of_the_source(to, groups, C, S, training):
    kind = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}.get(len(S), nn.BatchNorm1d)
    layer = settle(kind(C, eps=1e-2).double()).train(training)
    x = torch.randn(4, C, *S, dtype=torch.float64) * 3 + 10
    wanted = by_formula(x, groups, layer)
    bn.convert(layer, to=to)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    one = layer(x[:1])
    torch.testing.assert_close(one, wanted[:1], rtol=1e-12, atol=1e-12)  # whatever else is in the batch


def test_layer_norm_of_channels_on_the_last_axis_is_torchs():
    layer = settle(bn.BatchNorm(6, channel_axis=-1, dtype=torch.float64))
    x = torch.randn(4, 5, 6, dtype=torch.float64) * 3 + 10
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    wanted = (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias
    bn.convert(layer, to="layer")
    assert type(layer) is nn.LayerNorm
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [1, -1])
def test_none_leaves_weight_and_bias(axis):
    layer = settle(bn.BatchNorm(3, channel_axis=axis, dtype=torch.float64))
    x = torch.randn(4, 3, 5, 3, dtype=torch.float64)
    shape = (3, 1, 1) if axis == 1 else (3,)
    wanted = layer.weight.view(shape) * x + layer.bias.view(shape)
    bn.convert(layer, to="none")
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=0)
    assert type(bn.convert(nn.BatchNorm1d(3, affine=False), to="none")) is nn.Identity


def test_groups_divide_the_channels_and_are_not_small():
    alternative = Alternative("group")
    for channels in range(8, 600):
        groups = alternative.groups(channels)
        assert 1 <= groups <= 32
        assert channels % groups == 0
        assert channels // groups >= 8
    assert [alternative.groups(C) for C in (7, 16, 64, 256, 2048, 48, 37)] == [0, 2, 8, 32, 32, 6, 1]
    assert Alternative("group", 2).groups(4) == 2


def test_classes_parameters_and_what_follows(caplog):
    model = network()
    parameters = dict(model.named_parameters())
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.INFO, "batchnorm"):
        assert bn.convert(model, to="group") is model
    assert [type(model[i]) for i in (1, 6, 10)] == [nn.GroupNorm] * 3
    assert repr(model[1]).startswith("GroupNorm(2, 16,")
    assert {name: id(value) for name, value in model.named_parameters()} == {k: id(v) for k, v in parameters.items()}
    assert dict(model.named_buffers()) == {}
    assert "convert: 4 of 4 batch norms replaced by group norms" in caplog.text
    x = torch.randn(2, 24, 3, 3)
    plain = nn.GroupNorm(3, 24)
    plain.load_state_dict({name: model[4].state_dict()[name] for name in ("weight", "bias")})
    torch.testing.assert_close(model[4](x), nn.functional.silu(plain(x)))  # the subclass still calls its activation
    model(sample())
    assert seen == [1]


@pytest.mark.parametrize("before", [lambda model: model, bn.convert, bn.fuse], ids=["torch", "converted", "fused"])
@pytest.mark.parametrize("to", KINDS)
def test_there_and_back_again_is_the_identity(to, before):
    model = network()
    model[1].custom = "kept"
    model[6].eval()
    rows, state = shape_of(model), copy.deepcopy(model.state_dict())
    bn.convert(before(model), to=to, standardize_weights=True)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied(sample())
        bn.revert(copied)
        unchanged = [name for name in state if to != "instance" or not name.startswith("10.")]  # a batch norm still
        found = copied.state_dict()
        torch.testing.assert_close({n: found[n] for n in unchanged}, {n: state[n] for n in unchanged}, rtol=0, atol=0)
        assert [type(module) for module in copied.modules()] == [type(module) for module in network().modules()]
    assert shape_of(model) == rows
    copied(sample())


def test_what_was_learned_since_stays_and_buffers_follow_the_model():
    model = bn.convert(network(), to="layer")
    model.double()
    with torch.no_grad():
        model[1].weight.fill_(3)
    bn.revert(model)
    assert model[1].weight.eq(3).all()
    assert model[1].running_mean.dtype == torch.float64
    torch.testing.assert_close(model[1].running_mean, network()[1].running_mean.double())


def test_parameters_keep_learning_with_the_optimizer_of_before():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bn.convert(model, to="group", standardize_weights=True)
    before = copy.deepcopy(model.state_dict())
    model(sample()).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed >= {"0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias", "10.weight"}


class Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("layer", "to", "reason"),
    [
        (nn.BatchNorm2d(4), "group", "it has 4 channels, fewer than a group of 8; pass a smaller channels_per_group"),
        (nn.BatchNorm1d(16), "instance", "an instance of a channel is one value, and nothing of it would be left"),
        (nn.BatchNorm1d(1), "layer", "of which nothing would be left"),
        (nn.SyncBatchNorm(16), "instance", "it may get input of shape (N, C)"),
        (FrozenBatchNorm2d(16), "group", "it is frozen, so it does not depend on the batch"),
        (bn.freeze(nn.BatchNorm2d(16)), "group", "call batchnorm.unfreeze first"),
        (bn.freeze(Doubled(16)), "group", "call batchnorm.unfreeze first"),
        (nn.LazyBatchNorm2d(), "group", "it is still lazy; call the model once first"),
        (bn.LazyBatchNorm2d(), "none", "it is still lazy"),
        (Doubled(16), "group", "it is a Doubled, which computes something else"),
        (bn.BatchNorm(16, channel_axis=-1), "group", "its channels are on axis -1"),
        (bn.BatchNorm1d(16, dtype=torch.complex64), "group", "it is complex"),
    ],
)
def test_what_stays_says_why(layer, to, reason, caplog):
    model = nn.Sequential(layer)
    before = shape_of(model)
    bn.convert(model, to=to)
    assert reason in caplog.text
    assert "0 of 1 batch norms replaced" in caplog.text
    assert shape_of(model) == before


def test_nothing_that_is_converted_erases_its_input():
    """An erased signal would leave the bias alone, whatever comes in."""
    for to in ("group", "layer", "none"):
        for C in (2, 8, 9, 64):
            layer = bn.convert(nn.BatchNorm1d(C), to=to)
            if not isinstance(layer, nn.BatchNorm1d):
                first, second = layer(torch.randn(2, C)), layer(torch.randn(2, C))
                assert not torch.allclose(first, second)
    sequence = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4))
    assert type(bn.convert(sequence, to="instance")[1]) is nn.InstanceNorm1d


def test_layers_of_ours_keep_their_activation_and_come_back_with_their_source():
    layer = settle(bn.BatchNorm2d(16, activation="relu", statistics=Ghost(2)))
    x = torch.randn(4, 16, 3, 3)
    plain = nn.GroupNorm(2, 16)
    plain.load_state_dict({name: layer.state_dict()[name] for name in ("weight", "bias")})
    bn.convert(layer, to="group")
    torch.testing.assert_close(layer(x), plain(x).relu())
    bn.revert(layer)
    assert type(layer) is bn.BatchNorm2d
    assert (str(layer.activation), layer.statistics) == ("relu", Ghost(2))
    layer(x)


def test_without_a_bias():
    for to in KINDS:
        layer = bn.convert(bn.BatchNorm2d(16, bias=False), to=to)
        layer(torch.randn(2, 16, 4, 4)).sum().backward()
        assert layer.weight.grad is not None


def test_shared_layers_stay_shared():
    shared = nn.BatchNorm2d(16)
    model = bn.convert(nn.Sequential(shared, nn.ReLU(), shared), to="group")
    assert model[0] is model[2] is shared
    assert type(shared) is nn.GroupNorm
    assert type(bn.revert(model)[2]) is nn.BatchNorm2d


def test_a_class_that_a_tool_changed_since_is_left(caplog):
    layer = bn.convert(nn.BatchNorm2d(16), to="group")
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    bn.revert(nn.Sequential(layer))
    assert "its class became ParametrizedGroupNorm after the conversion; undo that first" in caplog.text
    parametrize.remove_parametrizations(layer, "weight")
    assert type(bn.revert(layer)) is nn.BatchNorm2d


def test_parametrized_batch_norms_stay_parametrized():
    layer = nn.BatchNorm2d(16)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    wanted = nn.functional.group_norm(x := torch.randn(2, 16, 3, 3), 2, layer.weight, layer.bias, layer.eps)
    cls = type(layer)
    bn.convert(layer, to="group")
    torch.testing.assert_close(layer(x), wanted)
    assert type(bn.revert(layer)) is cls


def test_an_exception_leaves_the_model_as_it_was(monkeypatch):
    model = bn.fuse(network())
    before = shape_of(model)

    def fail(*_):
        raise RuntimeError("half-way")

    monkeypatch.setattr(sys.modules["batchnorm.surgery.convert"], "standardize", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        bn.convert(model, to="group", standardize_weights=True)
    assert shape_of(model) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "batch"}, InputError, "to must be one of 'group', 'layer', 'instance', 'none', but got 'batch'"),
        ({"to": "group", "channels_per_group": 1}, InputError, "at least 2, but got 1; groups of one channel are"),
        ({"to": "group", "channels_per_group": 2.0}, ArgumentError, "must be an int, but got float"),
        ({"to": "group", "fuse": True}, ArgumentError, "which are options of batch norms"),
        ({"to": "none", "statistics": Ghost(2)}, ArgumentError, "leave them out"),
        ({"standardize_weights": True}, ArgumentError, "standardize_weights needs to='group'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        bn.convert(nn.BatchNorm1d(3), **options)


def test_standardized_weights_are_those_of_the_formula():
    """Equation 6 of Qiao et al. 2019, channel by channel."""
    convolution = nn.Conv2d(6, 4, 3, groups=2, padding=1).double()
    model = nn.Sequential(convolution, nn.BatchNorm2d(4))
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    weight = torch.empty_like(convolution.weight)
    for o, values in enumerate(convolution.weight.detach()):
        mean = values.sum() / values.numel()
        weight[o] = (values - mean) / ((values - mean).square().sum() / values.numel() + EPS).sqrt()
    wanted = nn.functional.conv2d(x, weight, convolution.bias, padding=1, groups=2)
    bn.convert(model, to="layer", standardize_weights=True)
    torch.testing.assert_close(convolution(x), wanted, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert torch.autograd.gradcheck(standardized, convolution.weight)


def test_weights_that_standardizing_would_erase_stay(caplog):
    class Padded(nn.Conv2d):
        def forward(self, input):
            return super().forward(nn.functional.pad(input, (1, 1, 1, 1)))

    model = nn.Sequential(nn.Conv2d(16, 16, 1, groups=16), nn.Conv2d(1, 16, 1), Padded(16, 16, 3), nn.BatchNorm2d(16))
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.convert(model, to="group", standardize_weights=True)
    for line in ("0: it has one weight", "1: it has one weight", "2: it has a forward of its own", "weights of 0 conv"):
        assert line in caplog.text


def test_affine_prints_and_traces():
    layer = bn.convert(nn.BatchNorm2d(3), to="none")
    assert isinstance(layer, Affine)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
