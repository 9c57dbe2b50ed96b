"""Folding batch norms away: the same outputs, from fewer layers, or the reason why not."""

import copy
import json
import math
import pickle
import random
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import batchnorm as bn
from batchnorm.folding.modules import ChannelPad
from batchnorm.folding.record import difference
from batchnorm.statistics import Domains, Running
from tests.networks import FrozenBatchNorm2d, settle


@pytest.fixture(autouse=True)
def _without_measuring_long(monkeypatch):
    monkeypatch.setattr(bn.folding, "_SECONDS", 0.0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def folded(model, x, batch_norms=0):
    """Fold in float64, exactly; the model is not touched; so many batch norms are left."""
    model = settle(model).double()
    before, state, flags = str(model), copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    found, report = bn.fold(model, x, tolerance=1e-9)
    assert (str(model), [m.training for m in model.modules()]) == (before, flags)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert report.batch_norms_after == len(report.left) == batch_norms, report
    with torch.no_grad():
        again = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(8)) * 3
        torch.testing.assert_close(found(again), model.eval()(again), rtol=1e-9, atol=1e-9)
    return found, report


CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize(
    "options", [{}, {"groups": 2}, {"groups": 4}, {"dilation": 2, "bias": False}, {"stride": 2}], ids=str
)
def test_after_a_convolution(rank, transposed, options):
    convolution = CONVOLUTIONS[rank][transposed](4, 8, 3, padding=1, **options)
    model, report = folded(nn.Sequential(convolution, NORMS[rank](8), nn.ReLU()), normal(2, 4, *[6] * rank))
    assert report.folded == (bn.folding.Folded("1", ("0",), "after"),)
    assert type(model[0]) is type(convolution)
    assert type(model[1]) is nn.Identity
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no-affine"])
def test_after_a_linear_layer(bias, affine):
    folded(nn.Sequential(nn.Linear(4, 3, bias=bias), nn.BatchNorm1d(3, affine=affine)), normal(5, 4))


def test_ours_with_activation_and_options():
    layers = (
        bn.BatchNorm2d(4, activation="silu"),
        bn.BatchNorm2d(4, bias=False),
        bn.BatchNorm2d(4, statistics=Running()),
    )
    model = nn.Sequential(*[m for norm in layers for m in (nn.Conv2d(4, 4, 1), norm, nn.ReLU())])
    found, _ = folded(model, normal(2, 4, 3, 3))
    assert str(found[1]) == "Rest(silu)"
    folded(nn.Sequential(nn.Linear(4, 3), bn.BatchNorm(3, channel_axis=-1)), normal(2, 5, 4))
    folded(
        bn.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), save_memory=True),
        normal(2, 4, 3, 3),
    )


def test_channels_of_linear_layers_and_batch_norms_in_3d_are_different_ones():
    """torch's own folding is silently wrong here."""
    _, report = folded(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(5)), normal(2, 5, 4), batch_norms=1)
    assert "the channels are on axis 1 of 3, which is not the channel axis of 0, a Linear" in report.left["1"]
    _, report = folded(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(4, 3)), normal(2, 5, 4), batch_norms=1)
    assert "which is not the channel axis of 1, a Linear" in report.left["0"]
    _, report = folded(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), normal(2, 5, 4), batch_norms=1)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2, "same"])
@pytest.mark.parametrize("groups", [1, 2])
def test_before_a_convolution_also_at_its_borders(mode, padding, groups):
    options = {"padding": padding, "padding_mode": mode, "groups": groups, "dilation": (1, 2), "bias": False}
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, **options))
    found, report = folded(model, normal(2, 4, 5, 7))
    pads = mode == "zeros" and padding != 0
    assert report.folded[0].kind == ("before, padded" if pads else "before")
    assert type(found[0]) is (ChannelPad if pads else nn.Identity)


def test_before_a_convolution_with_a_padding_of_its_own():
    found, report = folded(
        nn.Sequential(nn.BatchNorm2d(3), nn.ConstantPad2d((1, 0, 2, 1), 0.5), nn.Conv2d(3, 4, 3)), normal(2, 3, 5, 5)
    )
    assert type(found[1]) is ChannelPad
    assert report.folded[0].kind == "before"
    found, _ = folded(nn.Sequential(nn.BatchNorm2d(3), nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3)), normal(2, 3, 5, 5))


def test_one_padding_for_several_convolutions_or_none():
    model = Graph(lambda m, x: m.a(y := m.norm(x)) + m.b(y).relu(), norm=nn.BatchNorm2d(3))
    model.a, model.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, (3, 3), padding=(1, 1), bias=False)
    found, report = folded(model, normal(2, 3, 5, 5))
    assert report.folded == (bn.folding.Folded("norm", ("a", "b"), "before, padded"),)
    assert (type(found.norm), found.a.padding, found.b.padding) == (ChannelPad, (0, 0), (0, 0))
    model.b = nn.Conv2d(3, 4, 1)
    _, report = folded(model, normal(2, 3, 5, 5), batch_norms=1)
    assert report.left["norm"].endswith("a pads, and other layers would be padded too")


def test_one_after_the_other():
    _, report = folded(
        nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        normal(2, 3, 4, 4),
    )
    assert sorted((pair.batch_norm, pair.kind) for pair in report.folded) == [
        ("0", "before"),
        ("1", "before"),
        ("3", "after"),
        ("4", "after"),
    ]


def test_before_a_linear_layer():
    folded(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), normal(5, 4))
    folded(nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)), normal(5, 4, 3, 3))
    folded(
        nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(4, 3)),
        normal(5, 4, 3, 3),
    )
    folded(nn.Sequential(bn.BatchNorm(4, channel_axis=2), nn.Linear(4, 3, bias=False)), normal(2, 5, 4))


def test_a_shift_before_a_transposed_convolution_stays():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 2, 3))
    _, report = folded(model, normal(2, 4, 5), batch_norms=1)
    assert "1, a ConvTranspose1d, spreads the shift unevenly" in report.left["0"]


def test_a_channel_that_is_scaled_to_nothing_has_no_padding():
    model = settle(nn.Sequential(nn.BatchNorm1d(2), nn.Conv1d(2, 2, 3, padding=1))).double()
    model[0].weight.data[1] = 0
    found, report = bn.fold(model, normal(2, 2, 5))
    assert "a channel with scale 0 has no padding for 1" in report.left["0"]
    assert type(found[0]) is nn.BatchNorm1d


class Graph(nn.Module):
    """A model of some modules and a function of them and of x."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def test_after_an_addition_and_after_a_concatenation():
    def graph(m, x):
        total = m.norm(m.first(x) + m.own(m.second(x)))
        total -= m.third(x)
        return m.last(torch.cat([m.first_again(total), m.second_again(total).relu()], 1))

    model = Graph(
        graph, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(3, 4, 3, padding=1, bias=False), own=nn.BatchNorm2d(4),
        norm=nn.BatchNorm2d(4), third=nn.Conv2d(3, 4, 1), first_again=nn.Conv2d(4, 2, 1), second_again=nn.Conv2d(4, 3, 1),
        last=nn.BatchNorm2d(5),
    )  # fmt: skip
    _, report = folded(model, normal(2, 3, 5, 5), batch_norms=1)
    assert report.folded[1].into == ("first", "second")
    assert "before it is relu" in report.left["last"]
    model.function = lambda m, x: m.last(torch.cat([m.first_again(m.first(x)), m.second_again(m.second(x))], dim=-3))
    _, report = folded(model, normal(2, 3, 5, 5), batch_norms=2)
    assert report.folded[0] == bn.folding.Folded("last", ("first_again", "second_again"), "after")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.norm(y := m.conv(x)) + y, "the output of conv also goes elsewhere"),
        (lambda m, x: m.norm(m.conv(m.conv(x))), "conv is called several times"),
        (lambda m, x: m.norm(m.conv(m.norm(x))), "it is called several times"),
        (lambda m, x: m.norm(m.conv(x) * m.conv.weight.sum()), "before it is mul"),
        (lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum(), "conv has weights that other code reads"),
        (lambda m, x: m.norm(x.abs()).relu(), "before it is abs; after it is relu"),
        (lambda m, x: m.conv(m.norm(x)) + m.norm.weight.sum(), "it has weights that other code reads"),
        (lambda m, x: m.norm(F.conv2d(x, m.conv.weight)), "before it is conv2d"),
        (lambda m, x: m.conv(y := m.norm(x)) + y.relu_(), "after it is relu_"),
        (lambda m, x: m.conv(m.norm(y := x.clone())) + y.relu_(), "relu_ writes into its input"),
        (lambda m, x: m.norm(m.conv(x) + m.conv.bias.view(4, 1, 1)), "before it is add"),
        (lambda m, x: m.norm((y := m.conv(x)) + y), "also goes elsewhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_folded_says_why(function, reason):
    model = Graph(function, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    _, report = folded(model, normal(2, 4, 5, 5), batch_norms=1)
    assert reason in report.left["norm"]


def test_modules_that_somebody_watches_or_changed_stay():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda *_: None)
    assert "hooks" in folded(model, normal(2, 3, 4, 4), batch_norms=1)[1].left["1"]
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    assert "parametrized" in folded(model, normal(2, 3, 4, 4), batch_norms=1)[1].left["1"]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    prune.l1_unstructured(model[0], "weight", amount=2)
    prune.l1_unstructured(model[3], "weight", amount=2)
    report = bn.fold(settle(model), normal(2, 3, 4, 4).float())[1]
    assert report.left["1"].startswith("0 cannot absorb it: it has hooks")
    assert report.left["3"] == "it has hooks or a forward of its own"
    bn.fuse(model)
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    tied[2].weight = tied[0].weight
    assert "shares its weights" in folded(tied, normal(2, 3, 4, 4), batch_norms=1)[1].left["1"]

    class Twice(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    class Named(nn.Conv2d):
        """A subclass that computes the same."""

    model = nn.Sequential(Named(3, 3, 1), Twice(3))
    assert "Twice, which computes something else" in folded(model, normal(2, 3, 4, 4), batch_norms=1)[1].left["1"]
    folded(nn.Sequential(Named(3, 3, 1), nn.BatchNorm2d(3)), normal(2, 3, 4, 4))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    assert "no running statistics" in folded(model, normal(2, 3, 4, 4), batch_norms=1)[1].left["1"]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3, statistics=Domains(("a", "b"))))
    assert "may change in inference" in folded(model, normal(2, 3, 4, 4), batch_norms=1)[1].left["1"]


class BatchNormAct2d(nn.BatchNorm2d):
    """A batch norm with its activation, as in timm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


def test_batch_norms_of_other_libraries():
    found, _ = folded(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)), normal(2, 3, 5, 5))
    assert type(found[1]) is nn.SiLU
    found, _ = folded(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)), normal(2, 3, 5, 5))
    assert type(found[1]) is nn.Identity


def test_a_residual_stays_in_the_place_of_the_batch_norm():
    norm = bn.BatchNorm2d(3, activation="relu")
    model = Graph(lambda m, x: m.norm(m.conv(x), residual=x), conv=nn.Conv2d(3, 3, 1), norm=norm)
    found, _ = folded(model, normal(2, 3, 4, 4))
    assert str(found.norm) == "Rest(relu)"
    model.function = lambda m, x: m.norm(m.conv(x), mask=x[:, 0] > 0)
    model.norm = bn.BatchNorm2d(3)
    assert folded(model, normal(2, 3, 4, 4), batch_norms=1)[1].left["norm"] == "it is called with more than its input"


class Unclear(nn.Module):
    """Cannot be traced: which way it goes depends on values."""

    def __init__(self, *layers, shared=False):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.watched = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x)
        return self.norm(self.watched(x)) if x.sum() > -1e9 else x


def test_of_what_cannot_be_traced_the_parts_are_folded():
    inner = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Unclear(inner, nn.ReLU()), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    )
    found, report = folded(model, normal(2, 3, 5, 5), batch_norms=1)
    assert [pair.batch_norm for pair in report.folded] == ["1", "4", "2.layers.0.1", "2.watched.1"]
    assert report.left == {"2.norm": "its module could not be traced"}
    assert "symbolically traced variables" in report.untraced["2"]
    assert type(found[2]) is Unclear


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(F.pad(m.conv(x), [0, x.shape[-1] % 2]) if x.size(-1) % 2 else m.conv(x)),
        lambda m, x: m.norm(y := m.conv(x)).view(y.shape[0], -1) + torch.ones_like(y).flatten(1),
        lambda m, x: m.norm((y := m.conv(x)).transpose(1, 2).transpose(2, 1)).reshape_as(y) + y.size(1) + len(x),
        lambda m, x: m.norm(m.conv(x)) * torch.arange(4.0, dtype=torch.float64),
        lambda m, x: torch.cat([m.norm(m.conv(part)) for part in x.split(int(x.shape[0]), 0)]),
    ],
)
def test_forwards_that_look_at_shapes(function):
    model = Graph(function, conv=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4))
    folded(model, normal(2, 4, 4, 4))


def test_linear_layers_whose_features_are_flattened():
    """LeViT's: linear, then batch norm over the flattened positions."""
    model = Graph(
        lambda m, x: m.norm((y := m.linear(x)).flatten(0, 1)).reshape_as(y),
        linear=nn.Linear(4, 3),
        norm=nn.BatchNorm1d(3),
    )
    folded(model, normal(2, 5, 4))
    model.function = lambda m, x: m.norm(m.linear(x).view(-1, 3))
    folded(model, normal(2, 5, 4))
    model.function = lambda m, x: m.norm(m.linear(x).permute(0, 2, 1)).transpose(-1, -2)
    folded(model, normal(2, 5, 4))
    model.function = lambda m, x: m.norm(m.linear(x).mean(1))
    folded(model, normal(2, 5, 4))


def test_a_graph_that_is_not_what_the_model_does_is_not_used():
    class Deceived(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) if isinstance(x, torch.Tensor) else x

    _, report = folded(Deceived(), normal(2, 3, 4, 4), batch_norms=1)
    assert report.untraced == {"the model": "the output of its graph differs"}


def test_optional_arguments_and_named_ones():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x, scale=None, deep=True):
            y = self.norm(self.conv(x)) if deep else x
            return {"y": y if scale is None else y * scale}

    model, x = settle(Optional()), normal(2, 3, 4, 4).float()
    for inputs in ({"x": x}, (x, x), (x, None, True), [x]):
        found, report = bn.fold(model, inputs)
        assert report.batch_norms_after == 0
        torch.testing.assert_close(found(x, scale=x)["y"], model.eval()(x, x)["y"])
    with pytest.raises(bn.errors.ArgumentError, match="example_input must be a tensor"):
        bn.fold(model, 3)


def test_over_the_tolerance_it_raises():
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    x = normal(2, 3, 9, 9).float()
    with pytest.raises(bn.errors.FoldingError, match=r"within 0 for outputs up to 1, but differs by \d"):
        bn.fold(model, x, tolerance=0)
    assert bn.fold(model, x)[1].max_error < 1e-5
    assert model.training
    for wrong in (-1, float("nan")):
        with pytest.raises(bn.errors.InputError, match="at least 0"):
            bn.fold(model, x, tolerance=wrong)
    with pytest.raises(bn.errors.ArgumentError, match=r"must be a torch.nn.Module"):
        bn.fold([model], x)


def test_dtype_layout_and_flags_are_kept():
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)
    model = settle(nn.Sequential(*layers)).to(torch.bfloat16, memory_format=torch.channels_last)
    model[0].requires_grad_(False)
    found, report = bn.fold(model, normal(2, 3, 8, 8).bfloat16(), tolerance=0.05)
    assert {value.dtype for value in found.state_dict().values()} == {torch.bfloat16}
    assert found[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert [value.requires_grad for value in found.parameters()] == [False, False, True, True]
    assert not found.training
    assert report.largest_output > 1


def test_lazy_layers_must_know_their_sizes():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(bn.errors.StateError, match="some are still lazy; call the model once first"):
        bn.fold(model, normal(2, 3, 8, 8).float())
    model(normal(2, 3, 8, 8).float())
    assert bn.fold(model, normal(2, 3, 8, 8).float())[1].batch_norms_after == 0


def test_a_compiled_model_is_folded_and_compiled():
    model = torch.compile(settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval(), backend="eager")
    x = normal(2, 3, 4, 4).float()
    found, report = bn.fold(model, x)
    assert (type(found), report.batch_norms_after) == (type(model), 0)
    torch.testing.assert_close(found(x), model(x))


def test_the_report_is_a_table_and_plain_data():
    model = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Tanh()))
    _, report = bn.fold(model, normal(2, 3, 9, 9).float())
    lines = str(report).splitlines()
    assert lines[0] == "1            after: 0"
    assert lines[1] == "3            left: before it is 2, a ReLU; after it is 4, a Tanh"
    assert lines[2] == "batch norms  2 -> 1"
    assert lines[3] == "parameters   288 -> 256"
    said = json.loads(json.dumps(report.to_dict()))
    assert said["folded"] == [{"batch_norm": "1", "into": ["0"], "kind": "after"}]
    assert said["seconds_before"] > 0
    assert said["tolerance"] == 1e-4


def test_the_model_may_be_a_batch_norm_itself():
    assert folded(nn.BatchNorm2d(3), normal(2, 3, 4, 4), batch_norms=1)[1].left == {
        "the model": "its module could not be traced"
    }


class RepVGG(nn.Module):
    """Ding et al. 2021: a 3x3, a 1x1 and an identity branch, each with a batch norm."""

    def __init__(self, channels=4, stride=1, groups=1, shortcut=None):
        super().__init__()

        def branch(size):
            convolution = nn.Conv2d(channels, channels, size, stride, size // 2, groups=groups, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(channels))

        self.large, self.small = branch(3), branch(1)
        self.shortcut = nn.BatchNorm2d(channels) if shortcut is None else shortcut
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.large(x) + self.small(x) + self.shortcut(x))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shortcut", [None, nn.Identity()], ids=["norm", "identity"])
def test_parallel_branches_become_one_convolution(groups, shortcut):
    model = nn.Sequential(RepVGG(groups=groups, shortcut=shortcut), RepVGG(groups=groups, shortcut=shortcut))
    found, report = folded(model, normal(2, 4, 5, 6))
    assert list(found.state_dict()) == [f"{n}.large.0.{name}" for n in (0, 1) for name in ("weight", "bias")]
    last = "the input" if shortcut else "0.shortcut"
    assert report.merged[0] == bn.folding.Merged("0.large.0", ("0.large.0", "0.small.0", last))
    assert isinstance(found[0], RepVGG)
    assert not any(word in found[0].forward.source for word in ("small", "shortcut", "+"))
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        x = normal(1, 4, 3, 3)
        torch.testing.assert_close(twin(x), found(x), rtol=0, atol=0)
        twin[0].large[0].weight.data.zero_()
        assert (twin(x) - found(x)).abs().max() > 0.1
    assert "0.large.0 + 0.small.0" in str(report)


def test_branches_that_do_not_fit_stay():
    model = RepVGG(stride=2, shortcut=nn.Conv2d(4, 4, 3, 2, dilation=2, padding=2, bias=False))
    found, report = folded(model, normal(2, 4, 8, 8))
    assert report.merged == (bn.folding.Merged("large.0", ("large.0", "small.0")),)
    assert type(found.shortcut) is nn.Conv2d
    for other in (nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 5, padding=2, padding_mode="circular"), nn.ReLU()):
        found, report = folded(RepVGG(shortcut=other), normal(2, 4, 8, 8))
        assert report.merged[0].branches == ("large.0", "small.0")

    def rectangle(m, x):
        return m.tall(x) + m.wide(x) + m.spread(x) + x

    model = Graph(
        rectangle, tall=nn.Conv2d(3, 3, (5, 1), padding=(2, 0)), wide=nn.Conv2d(3, 3, (1, 3), padding=(0, 1)),
        spread=nn.Conv2d(3, 3, 3, padding=2, dilation=2),
    )  # fmt: skip
    _, report = folded(model, normal(2, 3, 8, 8))
    assert report.merged == (bn.folding.Merged("spread", ("spread", "the input")),)
    model.function = lambda m, x: m.tall(x).add_(m.wide(x.relu())) + m.tall(x)
    assert folded(model, normal(2, 3, 8, 8))[1].merged == ()
    model.function = lambda m, x: m.tall(y := x.clone()) + m.wide(y) + y.relu_()
    assert folded(model, normal(2, 3, 8, 8))[1].merged == ()


PADDINGS = ("zeros", "reflect", "replicate", "circular")


KINDS = ("norm", "conv") * 4 + ("deconv", "linear", "add", "cat", "relu", "pool")


class Random(nn.Module):
    """A graph drawn node by node: each takes a recent value, of four axes, (2, C, H, W)."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        self.channels = draw.choice([2, 4])
        self.steps, channels = [], [self.channels]
        for number in range(draw.randint(3, 8)):
            last = len(channels) - 1
            source, other = (max(0, last - draw.choice([0, 0, 0, 1])) for _ in range(2))
            kind, C = draw.choice(KINDS), channels[source]
            if kind == "add" and channels[other] != C:
                kind = "cat"
            out = (
                C + channels[other]
                if kind == "cat"
                else draw.choice([2, 4])
                if kind in ("conv", "deconv", "linear")
                else C
            )
            groups, bias = draw.choice([1, 2]) if C % 2 == 0 else 1, draw.random() < 0.5
            if kind == "norm":
                self.add_module(f"norm{number}", draw.choice([nn.BatchNorm2d, bn.BatchNorm2d])(C, affine=bias))
            elif kind == "conv":
                size = draw.choice([1, 3])
                options = {"padding": size // 2, "padding_mode": draw.choice(PADDINGS), "groups": groups}
                self.add_module(f"conv{number}", nn.Conv2d(C, out, size, bias=bias, **options))
            elif kind == "deconv":
                self.add_module(f"deconv{number}", nn.ConvTranspose2d(C, out, 3, padding=1, groups=groups, bias=bias))
            elif kind == "linear":
                self.add_module(f"linear{number}", nn.Linear(C, out))
            elif kind == "pool":
                self.add_module(
                    f"pool{number}", draw.choice([nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.Dropout()])
                )
            self.steps.append((kind, f"{kind}{number}", source, other))
            channels.append(out)

    def forward(self, x):
        values = [x]
        for kind, name, source, other in self.steps:
            a, b = values[source], values[other]
            if kind == "add":
                y = a + b
            elif kind == "cat":
                y = torch.cat([a, b], 1)
            elif kind == "relu":
                y = a.relu()
            elif kind == "linear":
                y = getattr(self, name)(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                y = getattr(self, name)(a)
            values.append(y)
        return values[-1]


def test_folded_graphs_put_out_what_they_did():
    """And most of their batch norms are folded, so that it is not passed by folding nothing."""
    counts = []

    @settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 10**6))
    def check(seed):
        torch.manual_seed(seed)
        model = settle(Random(seed)).double()
        x = torch.randn(2, model.channels, 4, 5, dtype=torch.float64)
        found, report = bn.fold(model, x, tolerance=1e-9)
        assert len(report.folded) + len(report.left) >= report.batch_norms_before - report.batch_norms_after
        other = torch.randn(3, model.channels, 5, 4, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(found(other), model.eval()(other), rtol=1e-9, atol=1e-9)
        counts.append((report.batch_norms_before, len(report.folded)))

    check()
    before, gone = (sum(column) for column in zip(*counts, strict=True))
    assert gone > before / 3


def report_of(model, x, **options):
    """What became of the batch norms of a model that need not be foldable: folded, left."""
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
        found, report = bn.fold(model, x, **options)
        torch.testing.assert_close(found(x), expected, rtol=1e-6, atol=1e-6)
    return [pair.batch_norm for pair in report.folded], report.left


def test_several_batch_norms_before_one_padding():
    layers = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ZeroPad2d(1), nn.Conv2d(4, 5, 3)
    found, _ = folded(nn.Sequential(*layers), normal(2, 4, 5, 6))
    assert type(found[2]) is ChannelPad


def test_a_padding_that_cuts_off_stays():
    _, report = folded(
        nn.Sequential(nn.BatchNorm2d(4), nn.ZeroPad2d((1, -1, 0, 0)), nn.Conv2d(4, 5, 3)), normal(2, 4, 5, 6), 1
    )
    assert report.left["0"].endswith("1 cuts off what it does not pad")


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrized_biases_stay_and_parametrized_batch_norms_are_folded():
    convolution, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(convolution, "bias", Doubled())
    model = settle(nn.Sequential(convolution, nn.BatchNorm2d(4))).double()
    assert "0 cannot absorb it: its bias is parametrized" in report_of(model, normal(2, 4, 5, 5))[1]["1"]
    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    model = settle(nn.Sequential(nn.Conv2d(4, 4, 3), norm)).double()
    assert report_of(model, normal(2, 4, 5, 5)) == (["1"], {})


def test_a_batch_norm_of_a_block_that_also_hangs_elsewhere():
    model = Graph(lambda m, x: m.block(x.relu()), norm=(norm := nn.BatchNorm2d(4)))
    model.block = Graph(lambda m, x: m.a(x) + m.b(x) + m.norm(x), norm=norm)
    model.block.a, model.block.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    _, report = folded(model, normal(2, 4, 5, 5))
    assert report.merged[0].convolution == "block.a"


@pytest.mark.parametrize("called", [False, True])
def test_a_compiled_model_may_have_been_called(called):
    inner = settle(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).double().eval()
    model = torch.compile(inner, backend="eager")
    x = normal(2, 4, 5, 5)
    if called:
        with torch.no_grad():
            model(x)
    assert report_of(model, x) == (["_orig_mod.1"], {})


def test_what_is_not_called_is_called_that():
    unused = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = settle(
        Graph(lambda m, x: m.conv(x), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1), unused=unused)
    ).double()
    assert report_of(model, normal(2, 4, 3, 3))[1] == dict.fromkeys(("norm", "unused.1"), "it is not called")


def test_a_batch_norm_that_hangs_twice_is_reported_once():
    shared = nn.BatchNorm2d(4)
    layers = nn.Conv2d(4, 4, 3), shared, nn.Conv2d(4, 4, 3), shared
    model = settle(nn.Sequential(*layers)).double()
    assert report_of(model, normal(2, 4, 7, 7))[1] == {"1": "it is called several times"}


def test_plain_references_to_a_layer():
    model = Graph(lambda m, x: m.steps[1](m.steps[0](x)), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 3))
    model.steps = [model.conv, model.norm]
    settle(model).double()
    left = report_of(model, normal(2, 4, 5, 5))[1]
    assert left == {"norm": "a plain attribute refers to norm too, so the model would still call it"}
    model = Graph(lambda m, x: m.conv(m.steps[0](m.norm(x))), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 3))
    model.pad = nn.ZeroPad2d(1)
    model.steps = [model.pad]
    settle(model).double()
    assert "a plain attribute refers to pad" in report_of(model, normal(2, 4, 5, 5))[1]["norm"]


def test_an_empty_example_shows_nothing():
    class Twice(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) * 2

    model = settle(nn.Sequential(nn.Conv2d(4, 4, 3), Twice(4))).double().eval()
    with pytest.raises(bn.errors.InputError, match="at least one sample"):
        bn.fold(model, normal(0, 4, 5, 5))
    assert "computes something else" in report_of(model, normal(1, 4, 5, 5))[1]["1"]


def test_a_padding_beyond_the_dtype_stays():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(6e-5)
        model[0].bias.fill_(10)
    _, report = bn.fold(model, normal(2, 4, 5, 5).half(), tolerance=0.05)
    assert report.left["0"].endswith("the padding of 1 would not be finite in torch.float16")


def test_counters_of_the_model_do_not_move():
    def forward(m, x):
        m.count += 1
        return m.norm(m.conv(x)) * m.count

    model = settle(Graph(forward, norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))).double()
    model.register_buffer("count", torch.zeros(()))
    found, _ = bn.fold(model, normal(2, 4, 3, 3))
    assert (model.count.item(), found.count.item()) == (0, 0)


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model.lock = threading.Lock()
    with pytest.raises(bn.errors.StateError, match=r"one that copy\.deepcopy can copy, but TypeError: cannot pickle"):
        bn.fold(model, normal(1, 4, 3, 3).float())
    assert type(model[1]) is nn.BatchNorm2d


def test_branches_are_not_merged_where_gradients_are_switched_off():
    def forward(m, x):
        with torch.no_grad():
            h = m.conv(x)
        return m.a(h) + m.b(h)

    model = Graph(forward, norm=nn.Identity(), conv=nn.Conv2d(4, 4, 1))
    model.a, model.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    found, report = bn.fold(model, x)
    found(x).sum().backward()
    assert report.merged == ()
    assert found.conv.weight.grad is None


def test_what_torch_fx_traces_of_merged_branches_computes_the_same():
    """fx reads the forward of the root's class."""
    model = settle(RepVGG(shortcut=nn.Identity())).double().eval()
    x = normal(2, 4, 5, 6)
    expected = model(x)
    found, report = folded(model, x)
    assert report.merged
    for each in (torch.fx.symbolic_trace(found), torch.fx.symbolic_trace(nn.Sequential(found))):
        torch.testing.assert_close(each(x), expected, rtol=1e-4, atol=1e-4)


class Same(nn.Conv2d):
    """As timm's Conv2dSame: what is padded depends on the input's size."""

    def forward(self, x):
        pads = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in self._sizes(x)]
        x = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _sizes(self, x):
        return zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)


class StaticSame(nn.Conv2d):
    """As in efficientnet_pytorch: a padding of its own below it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    """Whose weights have no scale of their own."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Gain(nn.Linear):
    """Equalized learning rates: the bias has a gain of its own."""

    def forward(self, x):
        return F.linear(x, self.weight * 0.5, None if self.bias is None else self.bias * 3)


class Deaf(nn.Conv2d):
    """Whose forward does not ask for a bias."""

    def forward(self, x):
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 2}, {"dilation": 2}], ids=str)
@pytest.mark.parametrize("cls", [Same, StaticSame])
def test_after_a_convolution_with_a_forward_of_its_own(cls, options, bias):
    model = nn.Sequential(cls(4, 6, 3, bias=bias, **options), nn.BatchNorm2d(6), nn.SiLU())
    _, report = folded(model, normal(2, 4, 7, 8))
    assert report.folded == (bn.folding.Folded("1", ("0",), "after"),)


@pytest.mark.parametrize(
    "layer", [lambda: Standardized(4, 4, 1), lambda: Gain(4, 4), lambda: Deaf(4, 4, 1, bias=False)]
)
def test_a_forward_that_does_something_else_with_its_weights_keeps_the_batch_norm(layer):
    _, report = folded(
        nn.Sequential(layer(), bn.BatchNorm(4)), normal(2, 4, 4, 4) if "Gain" not in str(layer()) else normal(5, 4), 1
    )
    assert "before it is 0" in report.left["1"]


@pytest.mark.parametrize(
    ("function", "negative", "left"),
    [
        (lambda x: F.avg_pool2d(x, 2), True, 0),
        (lambda x: F.avg_pool2d(x, 3, 1, 1, False, False), True, 0),
        (lambda x: F.avg_pool2d(x, 3, 1, padding=1), True, 1),
        (lambda x: F.avg_pool2d(x, 3, ceil_mode=True), True, 1),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), True, 1),
        (lambda x: F.max_pool2d(x, 3, 2, 1), False, 0),
        (lambda x: F.max_pool2d(x, 3, 2, 1), True, 1),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], False, 1),
        (lambda x: F.adaptive_max_pool2d(x, 2), False, 0),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), True, 0),
        (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), True, 0),
        (lambda x: F.interpolate(x, (5, 9), mode="bilinear", align_corners=False), True, 0),
        (lambda x: F.interpolate(x, (5, 9), mode="bicubic"), True, 0),
        (lambda x: F.pad(x, (1, 1, 2, 0), mode="reflect"), True, 0),
        (lambda x: F.pad(x, (1, 1), "replicate") if x.dim() == 3 else F.pad(x, (1, 1, 0, 0), "replicate"), True, 0),
        (lambda x: F.pad(x, (1, 1)), True, 1),
        (lambda x: F.lp_pool2d(x, 2, 2), True, 1),
    ],
)
def test_through_functions(function, negative, left):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(6)

        def forward(self, x):
            return self.norm(torch.cat([function(self.a(x)), function(self.b(x))], 1))

    model = settle(Model())
    if not negative:
        model.norm.weight.data.abs_()
    model = model.double().eval()
    x = normal(2, 4, 8, 9)
    expected = model(x)
    found, report = bn.fold(model, x, tolerance=1e-9)
    assert report.batch_norms_after == left, str(report)
    torch.testing.assert_close(found(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_difference_that_is_not_a_number_is_not_lost_among_others(place):
    wanted = tuple(torch.zeros(2) for _ in range(3))
    not_a_number = tuple(torch.full((2,), torch.nan if index == place else 0.5) for index in range(3))
    assert math.isnan(difference(not_a_number, wanted))
    other_shape = tuple(torch.zeros(3 if index == place else 2) for index in range(3))
    assert math.isnan(difference(other_shape, wanted))
    empty = tuple(torch.zeros(0 if index == place else 2) for index in range(3))
    assert math.isnan(difference(wanted, empty))
    assert difference(wanted, wanted) == 0.0
