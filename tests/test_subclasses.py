"""Subclasses of torch's batch norms: recognized by what they compute, converted with it, reverted; frozen in any case."""

import copy
import logging
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.surgery import Absorbed
from tests.layer_table import ACTIVATIONS
from tests.networks import FrozenBatchNorm2d, settle
from tests.test_blocks import BatchNormAct2d
from tests.test_surgery import shape_of


class Plain(nn.BatchNorm2d):
    """Another name, and a method."""

    def mean_of_statistics(self):
        return self.running_mean.mean()


class Functional(nn.BatchNorm2d):
    function = staticmethod(F.relu)

    def forward(self, x):
        return self.function(super().forward(x))


class AnyRank(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        assert input.dim() > 1


class SyncAct(nn.SyncBatchNorm):
    """As timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenAct(FrozenBatchNorm2d):
    """As timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Act3d(nn.BatchNorm3d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Dropping(nn.BatchNorm1d):
    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.GELU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Doubled(nn.BatchNorm2d):
    """What ours do not compute."""

    def forward(self, x):
        return 2 * super().forward(x)


class Conditional(nn.BatchNorm2d):
    def forward(self, x, scale=None):
        y = super().forward(x)
        return y if scale is None else y * scale


def functional(function):
    layer = Functional(4)
    layer.function = function
    return layer


FUNCTIONS = {
    **{name: module.forward for name, module in ACTIVATIONS.items() if name != "leaky_relu"},
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "leaky_relu(0.3)": lambda z: F.leaky_relu(z, 0.3),
    "None": lambda z: z,
}
LAYERS = {
    "plain": lambda: Plain(4),
    "act": lambda: BatchNormAct2d(4),
    "no act": lambda: BatchNormAct2d(4, act=False),
    "any rank": lambda: AnyRank(4),
    "sync": lambda: SyncAct(4),
    "frozen": lambda: FrozenAct(4),
    "3d": lambda: Act3d(4),
    "dropping": lambda: Dropping(4),
    "zero weight": lambda: BatchNormAct2d(4).requires_grad_(False),
    **{f"functional {name}": lambda function=function: functional(function) for name, function in FUNCTIONS.items()},
}


def sample(layer, training=True):
    sizes = {nn.BatchNorm3d: (3, 3, 3), nn.BatchNorm1d: (5,)}
    spatial = next((size for cls, size in sizes.items() if isinstance(layer, cls)), (5, 5))
    return torch.randn(6, 4, *spatial, dtype=torch.float64, generator=torch.Generator().manual_seed(3 + training))


def trained(model):
    results = []
    for training in (True, False):
        torch.manual_seed(2)
        x = sample(model[0], training).requires_grad_()
        y = model.train(training)(x)
        y.square().sum().backward()
        results += [y, x.grad, *(value.grad for value in model.parameters())]
        model.zero_grad()
    return results


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("surgery", [bn.convert, bn.fuse, bn.freeze], ids=lambda surgery: surgery.__name__)
def test_recognized_ones_are_converted_with_all_they_do_and_go_back(name, surgery, caplog):
    model = settle(nn.Sequential(LAYERS[name](), nn.Identity())).double()
    if name == "zero weight":
        model[0].weight.zero_()
    model[0].train().eval()
    expected, before, state = copy.deepcopy(model), shape_of(model), copy.deepcopy(model.state_dict())
    generators = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "batchnorm"):
        surgery(model)
    assert torch.equal(torch.get_rng_state(), generators)
    assert isinstance(model[0], bn.BatchNorm)
    assert "1 of 1 batch norms" in caplog.text or surgery is bn.fuse
    if surgery is bn.freeze:
        bn.unfreeze(model)
        if name == "frozen":
            bn.freeze(model)
    assert list(model.state_dict()) == list(state)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if "functional" not in name else model):
        torch.testing.assert_close(trained(twin), trained(copy.deepcopy(expected)), rtol=1e-9, atol=1e-9)
    if name not in ("sync", "frozen"):
        assert isinstance(model[0], type(expected[0]))
    model.load_state_dict(state)
    if surgery is bn.freeze and name == "frozen":
        bn.unfreeze(model)
        model[0].statistics = bn.statistics.Running()
    model.train(expected.training)
    model[0].eval()
    bn.revert(model)
    assert shape_of(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_of_a_forward_are_recognized(name):
    assert str(bn.convert(functional(FUNCTIONS[name])).activation) == name


def test_methods_and_checks_of_a_subclass_stay():
    assert bn.convert(Plain(4)).mean_of_statistics() == 0
    bn.convert(AnyRank(4))(torch.randn(3, 4))


def test_without_fuse_the_activation_stays_a_module_that_tools_can_hook():
    model, seen = settle(nn.Sequential(BatchNormAct2d(4))).double().eval(), []
    expected = model(sample(model[0]))
    model[0].act.register_forward_hook(lambda *_: seen.append(1))
    bn.convert(model)
    torch.testing.assert_close(model(sample(model[0])), expected)
    bn.fuse(model)  # a hook keeps them apart
    torch.testing.assert_close(model(sample(model[0])), expected)
    assert (model[0].activation, len(seen)) == (None, 2)


def test_fuse_takes_it_in_and_adds_where_there_is_none():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last, self.act = BatchNormAct2d(4), BatchNormAct2d(4, act=False), nn.SiLU()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.conv3, self.side = nn.Conv2d(4, 4, 1), BatchNormAct2d(4, act=False)

        def forward(self, x):
            return self.act(self.last(self.conv2(self.norm(self.conv1(x)))) + self.side(self.conv3(x)))

    model = settle(Sum()).double().eval()
    x = sample(model.norm)
    expected = model(x)
    bn.fuse(model)
    assert str(model.norm.activation) == "silu"
    assert isinstance(model.norm.act, Absorbed)
    assert model.forward.applies == {"last": "an addition and silu"}
    torch.testing.assert_close(model(x), expected)
    for each in (model, bn.convert(bn.revert(model)), bn.revert(model)):
        folded, report = bn.fold(each, x)
        assert report.batch_norms_after == 0, str(report)
        torch.testing.assert_close(folded(x), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "surgery", [lambda model: model, bn.convert, bn.fuse, bn.freeze], ids=["as-is", "convert", "fuse", "freeze"]
)
def test_folded_with_the_activation_of_their_forward(name, surgery):
    model = settle(nn.Sequential(nn.Conv2d(4, 4, 1), functional(FUNCTIONS[name]))).double().eval()
    x = sample(model[1])
    expected = model(x)
    folded, report = bn.fold(surgery(model), x)
    assert report.batch_norms_after == 0, str(report)
    torch.testing.assert_close(folded(x), expected)


@pytest.mark.parametrize("build", [Doubled, Conditional], ids=lambda build: build.__name__)
def test_what_is_not_recognized_is_left_with_a_warning_that_counts_and_frozen_anyway(build, caplog):
    model = settle(nn.Sequential(nn.Conv2d(4, 4, 1), build(4), nn.BatchNorm2d(4), build(4))).double()
    classes, shape = [type(layer) for layer in model], shape_of(model)
    with caplog.at_level(logging.WARNING, "batchnorm"):
        bn.convert(model)
    assert [type(layer) for layer in model] == [*classes[:2], bn.BatchNorm2d, classes[3]]
    (record,) = caplog.records
    reason = "which computes something else" if build is Doubled else "whose forward takes more than the input"
    assert record.getMessage() == f"convert: 1 of 3 batch norms changed; left 1, 3: it is a {build.__name__}, {reason}"
    expected = copy.deepcopy(model).eval()
    bn.freeze(model)
    state = copy.deepcopy(model.state_dict())
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin.train()(sample(model[1])), expected(sample(model[1])))
        torch.testing.assert_close(twin.state_dict(), state, rtol=0, atol=0)
        assert not any(value.requires_grad for value in twin[1].parameters())
        assert isinstance(twin[1], build)
    bn.freeze(model)  # once more changes nothing
    bn.unfreeze(model)
    bn.revert(model)
    assert shape_of(model) == shape
    assert model[1].training
    model(sample(model[1]))
    assert not torch.equal(model[1].running_mean, state["1.running_mean"])


def test_nothing_changed_is_never_silent(caplog):
    for operation, said in (
        (bn.convert, "convert: 0 of 0 batch norms changed; the model has none"),
        (bn.freeze, "freeze: 0 of 0 batch norms frozen; the model has none"),
        (bn.fuse, "fuse: 0 of 0 batch norms apply what follows them; the model has none"),
    ):
        caplog.clear()
        operation(nn.Linear(3, 3))
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", said)]
    caplog.clear()
    bn.convert(bn.convert(nn.BatchNorm1d(3)))
    assert [record.getMessage() for record in caplog.records] == ["convert: 0 of 1 batch norms changed; 1 already was"]


def test_many_layers_are_counted_and_a_few_named(caplog):
    bn.convert(nn.Sequential(*(Doubled(2) for _ in range(9))))
    assert "left 0, 1, 2 and 6 more: it is a Doubled" in caplog.text


class TestParametrized:
    def build(self):
        layer = nn.BatchNorm1d(4)
        parametrize.register_parametrization(layer, "weight", nn.Softplus())
        return settle(nn.Sequential(layer)).double()

    def test_converted_and_reverted(self):
        model = self.build()
        expected, cls = copy.deepcopy(model), type(model[0])
        bn.convert(model)
        torch.testing.assert_close(trained(model), trained(expected), rtol=1e-9, atol=1e-9)
        assert type(bn.revert(model)[0]) is cls

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_parametrizations_come_and_go_in_between(self, when):
        model = self.build() if when == "before" else settle(nn.Sequential(nn.BatchNorm1d(4))).double()
        bn.convert(model)
        if when == "before":
            parametrize.remove_parametrizations(model[0], "weight")
        else:
            parametrize.register_parametrization(model[0], "weight", nn.Softplus())
        expected = copy.deepcopy(model).eval()(sample(model[0]))
        bn.revert(model)
        assert isinstance(model[0], nn.BatchNorm1d)
        assert not isinstance(model[0], bn.BatchNorm)
        assert parametrize.is_parametrized(model[0]) == (when == "after")
        torch.testing.assert_close(model.eval()(sample(model[0])), expected)
        if when == "after":
            parametrize.remove_parametrizations(model[0], "weight")
        assert type(model[0]) is nn.BatchNorm1d

    @pytest.mark.parametrize("kind", ["parametrized", "pruned", "lazy"])
    def test_frozen_and_unfrozen(self, kind):
        model = self.build()
        if kind == "pruned":
            model = settle(nn.Sequential(nn.BatchNorm1d(4))).double()
            prune.l1_unstructured(model[0], "weight", amount=2)
        elif kind == "lazy":
            model = nn.Sequential(nn.LazyBatchNorm1d()).double()
        bn.freeze(model).train()
        x = sample(model[0])
        y = model(x.requires_grad_())
        assert model[0].num_batches_tracked == 0
        assert not any(value.requires_grad for value in model.parameters())
        torch.testing.assert_close(y, model.eval()(x))
        bn.unfreeze(model)
        assert all(value.requires_grad for value in model.parameters())
        model.train()(x)
        assert model[0].num_batches_tracked == 1


class TestFullyShard:
    @pytest.fixture(autouse=True)
    def mesh(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    @pytest.mark.parametrize("first", ["sharded", "converted"])
    @pytest.mark.parametrize("surgery", [bn.convert, bn.freeze, bn.synchronize], ids=lambda surgery: surgery.__name__)
    def test_converted_frozen_and_reverted(self, first, surgery, mesh):
        model = settle(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        expected = copy.deepcopy(model)
        if surgery is bn.freeze:
            expected[1].eval()
        steps = [lambda: fully_shard(model[1], mesh=mesh), lambda: surgery(model)]
        for step in steps if first == "sharded" else steps[::-1]:
            step()
        x = torch.randn(8, 4)
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model[1].running_mean, expected[1].running_mean)
        model(x).sum().backward()
        assert (model[1].weight.grad is None) == (surgery is bn.freeze)
        for undo in (bn.unfreeze, bn.unsynchronize, bn.revert):
            undo(model)
        assert isinstance(model[1], FSDPModule)
        assert isinstance(model[1], nn.BatchNorm1d)
        assert not isinstance(model[1], bn.BatchNorm)
        torch.testing.assert_close(model.eval()(x), copy.deepcopy(expected).eval()(x), rtol=1, atol=1)
        assert type(model[1]).__name__ == "FSDPBatchNorm1d"


class TestPrunedChannels:
    KEEP = torch.tensor([0, 2, 3])

    def pruned(self, statistics, also=()):
        layer = settle(bn.BatchNorm2d(4, statistics=statistics))
        layer(torch.randn(4, 4, 3, 3))
        for name in ("weight", "bias"):
            getattr(layer, name).data = getattr(layer, name).data[self.KEEP]
        for name in ("running_mean", "running_var", *also):
            setattr(layer, name, getattr(layer, name)[..., self.KEEP])
        layer.num_features = 3
        return layer

    @pytest.mark.parametrize(
        "statistics",
        SOURCES := [
            bn.statistics.MovingAverage(2),
            bn.statistics.Domains(("a", "b")),
            bn.statistics.Domains(("a", "b"), bn.statistics.MovingAverage(2)),
        ],
        ids=str,
    )
    def test_a_buffer_left_behind_is_named(self, statistics):
        layer = self.pruned(statistics)
        before = copy.deepcopy(layer.state_dict())
        with (
            bn.domain("b"),
            pytest.raises(bn.errors.StateError, match=r"running_mean_\w+ has 4 and running_mean has 3; prune it too"),
        ):
            layer(torch.randn(4, 3, 3, 3))
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
        layer.statistics = statistics  # begins them anew
        with bn.domain("b"):
            layer(torch.randn(4, 3, 3, 3, requires_grad=True)).sum().backward()

    @pytest.mark.parametrize("statistics", SOURCES, ids=str)
    def test_pruned_alike_it_runs(self, statistics):
        names = [
            name
            for name, buffer in bn.BatchNorm2d(4, statistics=statistics).named_buffers()
            if buffer.shape[-1:] == (4,)
        ]
        layer = self.pruned(statistics, names[2:])
        for name in ("a", "b"):
            with bn.domain(name):
                layer(torch.randn(4, 3, 3, 3, requires_grad=True)).sum().backward()

    @pytest.mark.parametrize(
        "statistics", [bn.statistics.Batch(), bn.statistics.Ghost(2), bn.statistics.Renorm()], ids=str
    )
    def test_without_buffers_of_its_own_it_runs(self, statistics):
        self.pruned(statistics)(torch.randn(4, 3, 3, 3, requires_grad=True)).sum().backward()
