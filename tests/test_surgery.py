"""Converting a model and going back: nothing that anybody could hold on to is lost."""

import copy
import logging
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from batchnorm.statistics import Running
from batchnorm.surgery import Absorbed, walk
from tests.networks import FrozenBatchNorm2d, settle


class Residual(nn.Module):
    """A block whose batch norm hangs in two places, with an activation that is not in a Sequential."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4), act=nn.SiLU())
        )
        self.again = self.norm
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.again(self.body(self.norm(x))) + x)


def network():
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Residual(), nn.BatchNorm2d(4, affine=False),
        nn.LeakyReLU(0.2), nn.Flatten(1), nn.Linear(144, 6), nn.BatchNorm1d(6, momentum=None), nn.Tanh(),
    )  # fmt: skip
    for value in model.parameters():
        value.data.uniform_(-0.5, 0.5)
    return model


def sample():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(6))


def shape_of(model: nn.Module) -> list[tuple]:
    """Everything but the weights: where hangs what, which objects, attributes and hooks."""
    rows = []
    for slot in walk(model):
        public = {k: v for k, v in vars(slot.module).items() if not k.startswith("_")}
        hooks = {k: len(v) for k, v in vars(slot.module).items() if k.endswith("_hooks") and v}
        tensors = [(k, id(v)) for k, v in {**slot.module._parameters, **slot.module._buffers}.items()]
        rows.append((slot.path, type(slot.module), id(slot.module), public, hooks, tensors))
    return rows


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_there_and_back_again_is_the_identity(fuse):
    model = network()
    model[1].custom = "kept"
    model[0].register_forward_hook(lambda *_: None)
    model[8].eval()
    model[4].running_mean.fill_(0.3)
    before, state = shape_of(model), copy.deepcopy(model.state_dict())
    converted = bn.convert(model, fuse=fuse)
    assert converted is model
    assert sum(isinstance(m, bn.BatchNorm) for m in model.modules()) == 5
    assert bn.revert(model) is model
    assert shape_of(model) == before
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_converted_models_do_the_same(fuse, dtype):
    torchs = network().to(dtype)
    ours = bn.convert(copy.deepcopy(torchs), fuse=fuse)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (torchs, ours)]
    for _ in range(3):
        losses = []
        for model, optimizer in zip((torchs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(sample().to(dtype)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    torch.testing.assert_close(ours.eval()(sample().to(dtype)), torchs.eval()(sample().to(dtype)))


def test_converting_leaves_everything_but_batch_norms_alone():
    model = network()
    before = [row for row in shape_of(model) if not issubclass(row[1], nn.modules.batchnorm._BatchNorm)]
    bn.convert(model)
    assert [row for row in shape_of(model) if not issubclass(row[1], nn.modules.batchnorm._BatchNorm)] == before
    assert all(layer.activation is None for layer in model.modules() if isinstance(layer, bn.BatchNorm))
    seen = []
    model[2].inplace = False
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.SiLU)):
            module.register_full_backward_hook(lambda module, *_: seen.append(type(module)))
    model(sample()).sum().backward()
    assert seen == [nn.ReLU, nn.SiLU, nn.ReLU]


def test_activations_in_a_sequential_are_taken_in():
    model = bn.convert(network(), fuse=True)
    assert (str(model[1].activation), str(model[4].activation)) == ("relu", "leaky_relu(0.2)")
    assert isinstance(model[2], Absorbed)
    assert repr(model[2]) == "Absorbed(ReLU(inplace=True))"
    assert str(model[3].body.norm.activation) == "silu"
    assert model[8].activation is None
    assert isinstance(model[9], nn.Tanh)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in network().named_parameters()]


def test_shared_layers_stay_shared_and_unfused(caplog):
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared, nn.SiLU()))
    expected = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.convert(model, fuse=True)
    assert model[0] is model[2] is model[3][0] is shared
    assert shared.activation is None
    assert "left 0 and 1 separate: the layer is in several places" in caplog.text
    assert "0, 2, 3.0 is now batchnorm.BatchNorm2d" in caplog.text
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("place", [0, 1], ids=["layer", "activation"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_keep_layer_and_activation_apart(place, kind):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    seen = []
    handle = getattr(model[place], kind)(lambda *arguments: seen.append(arguments[1:]))
    bn.convert(model, fuse=True)
    model(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert len(seen) == 1
    assert type(model[1]) is nn.ReLU
    handle.remove()
    model(torch.randn(4, 3))
    assert len(seen) == 1


def test_subclasses_are_left_alone_and_reported(caplog):
    class Mine(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.Sequential(Mine(3))
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.convert(model)
    assert type(model[0]) is Mine
    assert "left 0: it is a Mine" in caplog.text


def test_sequentials_with_their_own_forward_are_not_fused():
    class Skipping(nn.Sequential):
        def forward(self, input):
            return self[0](input)

    model = bn.convert(Skipping(nn.BatchNorm1d(3), nn.ReLU()), fuse=True)
    assert model[0].activation is None


def test_attributes_of_the_users_are_not_overwritten(caplog):
    layer = nn.BatchNorm1d(3)
    layer.activation = nn.Tanh()
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.convert(layer)
    assert type(layer) is nn.BatchNorm1d
    assert "an attribute 'activation' of its own" in caplog.text


def test_the_model_may_be_the_layer_itself():
    layer = nn.BatchNorm1d(3)
    assert bn.convert(layer) is layer
    assert type(layer) is bn.BatchNorm1d
    assert type(bn.revert(layer)) is nn.BatchNorm1d


def test_our_own_layers_take_activations_in_too():
    model = bn.convert(nn.Sequential(bn.BatchNorm1d(3), nn.GELU()), fuse=True)
    assert str(model[0].activation) == "gelu"
    again = bn.convert(model, fuse=True)
    assert str(again[0].activation) == "gelu"
    assert type(bn.revert(model)[1]) is nn.GELU


def test_revert_leaves_what_torch_cannot_say(caplog):
    model = nn.Sequential(
        bn.BatchNorm1d(3, activation="relu"),
        bn.BatchNorm(3),
        bn.BatchNorm1d(3, statistics=Running()),
        bn.BatchNorm1d(3, on_single="running"),
    )
    bn.revert(model)
    assert [type(layer) for layer in model] == [bn.BatchNorm1d, bn.BatchNorm, bn.BatchNorm1d, bn.BatchNorm1d]
    for reason in (
        "left 0: torch's layer has no activation",
        "left 1: torch has no BatchNorm",
        "left 2: torch's layer has no stat",
    ):
        assert reason in caplog.text


def test_training_flags_are_kept():
    model = network()
    model[1].eval()
    model[2].eval()
    bn.convert(model, fuse=True)
    assert not model[1].training
    model.train()
    bn.revert(model)
    assert model[2].training


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "no-affine"])
def test_half_precision_statistics_are_widened_and_come_back(affine):
    layer = nn.BatchNorm1d(3, affine=affine).bfloat16()
    layer.running_mean.fill_(0.3)
    state = copy.deepcopy(layer.state_dict())
    bn.convert(layer)
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(bn.revert(layer).state_dict(), state, rtol=0, atol=0)


def test_lazy_layers_stay_lazy():
    model = bn.convert(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()))
    assert type(model[0]) is bn.LazyBatchNorm2d
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(model(x), nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())(x))
    assert type(bn.revert(model)[0]) is nn.BatchNorm2d
    lazy = bn.revert(bn.convert(nn.LazyBatchNorm1d()))
    assert type(lazy) is nn.LazyBatchNorm1d
    lazy(torch.randn(4, 3))
    assert type(lazy) is nn.BatchNorm1d


def test_compiled_and_copied_after_conversion():
    model = bn.convert(network(), fuse=True)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(torch.compile(twin, backend="aot_eager", fullgraph=True)(sample()), model(sample()))
    torch.testing.assert_close(bn.revert(twin).state_dict(), bn.revert(model).state_dict())


def test_walk_ends_on_cycles_and_names_every_slot():
    parent, child = nn.Module(), nn.Module()
    parent.child, child.parent, parent.nothing = child, parent, None
    assert [slot.path for slot in walk(parent)] == ["", "child", "child.parent"]


@pytest.mark.parametrize("surgery", [bn.convert, bn.revert])
def test_a_model_is_a_module(surgery):
    with pytest.raises(bn.errors.ArgumentError, match=r"must be a torch.nn.Module, but got list"):
        surgery([nn.BatchNorm1d(3)])


@pytest.mark.parametrize("place", [0, 1, None], ids=["layer", "activation", "sequential"])
def test_a_forward_of_its_own_keeps_them_apart(place):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    module = model if place is None else model[place]
    original = module.forward
    module.forward = lambda x: original(x) * 2
    x = torch.randn(4, 3)
    expected = copy.deepcopy(model.state_dict()), model(x)
    model.load_state_dict(expected[0])
    torch.testing.assert_close(bn.convert(model, fuse=True)(x), expected[1])
    assert type(model[1]) is nn.ReLU


def test_an_exchanged_layer_does_not_lose_its_activation_silently():
    model = bn.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()), fuse=True)
    exchanged = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    with pytest.raises(
        bn.errors.StateError, match=r"ReLU\(\) must be in the place before it, but a SyncBatchNorm is there now"
    ):
        exchanged(torch.randn(4, 3))
    model[1] = nn.Sequential(model[1])  # wrapped, it is still there
    model(torch.randn(4, 3))


@pytest.mark.parametrize("name", ["num_nonfinite_batches", "gamma", "keep_wide_statistics"])
def test_names_with_a_meaning_in_ours_are_left(name):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    setattr(model[1], name, 3)
    bn.convert(model)
    assert [type(layer) for layer in model] == [bn.BatchNorm1d, nn.BatchNorm1d]


@pytest.mark.parametrize("half", ["weight", "running_mean"])
def test_mixed_dtypes_come_back(half):
    layer = nn.BatchNorm1d(3)
    getattr(layer, half).data = getattr(layer, half).data.half()
    before = copy.deepcopy(layer.state_dict())
    layer.keep = True
    bn.convert(layer).keep_wide_statistics = True
    torch.testing.assert_close(bn.revert(layer).state_dict(), before, rtol=0, atol=0)
    assert "keep_wide_statistics" not in vars(layer)


def test_a_model_cast_in_between_has_torchs_dtypes_afterwards():
    layer = bn.revert(bn.convert(nn.BatchNorm1d(3)).bfloat16())
    assert layer.running_mean.dtype == torch.bfloat16
    layer(torch.randn(4, 3).bfloat16())


def test_synchronized_layers_go_both_ways():
    group = object()
    model = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4, process_group=group), nn.ReLU())
    model[1].custom = "kept"
    before, state = shape_of(model), copy.deepcopy(model.state_dict())
    bn.convert(model)
    assert type(model[1]) is bn.BatchNorm
    expected = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    expected.load_state_dict(state)
    x = torch.randn(5, 3)
    torch.testing.assert_close(model(x), expected(x))
    bn.revert(model)
    assert shape_of(model) == before
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_synchronized_layers_of_several_processes_are_left_to_synchronize(monkeypatch, caplog):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    with caplog.at_level(logging.INFO, "batchnorm"):
        layer = bn.convert(nn.SyncBatchNorm(3))
    assert type(layer) is nn.SyncBatchNorm
    assert "batchnorm.synchronize, which converts it" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_frozen_batch_norms_of_other_libraries_go_both_ways(dtype):
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4, eps=1e-3), nn.ReLU())).to(dtype)
    model[1].custom = "kept"
    model[1].register_forward_hook(lambda *_: None)
    before, state, expected = shape_of(model), copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    bn.convert(model)
    layer = model[1]
    assert isinstance(layer, bn.BatchNorm)
    assert (layer.statistics, layer.eps, list(layer.parameters())) == (Running(), 1e-3, [])
    assert list(model.state_dict()) == list(state)
    x = torch.randn(2, 3, 4, 4).to(dtype)
    tolerance = {torch.bfloat16: 0.05}.get(dtype, 1e-5)
    torch.testing.assert_close(model(x), expected(x), rtol=tolerance, atol=tolerance)
    model.load_state_dict({**state, "1.num_batches_tracked": torch.tensor(3)})
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0, check_dtype=False)
    layer.later = "kept, too"
    bn.revert(model)
    del layer.later
    after = shape_of(model)
    if dtype != torch.bfloat16:  # statistics that were widened come back as other tensors
        assert after == before
    assert [row[:5] for row in after] == [row[:5] for row in before]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_unfrozen_ones_move_their_statistics_and_still_go_back():
    layer = bn.unfreeze(bn.convert(FrozenBatchNorm2d(3)))
    layer.train()(torch.randn(4, 3, 2, 2) + 1)
    assert (layer.running_mean > 0.05).all()
    assert type(bn.revert(layer)) is FrozenBatchNorm2d


def test_what_only_looks_like_a_frozen_batch_norm_is_left(caplog):
    class Other(FrozenBatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with caplog.at_level(logging.INFO, "batchnorm"):
        assert type(bn.convert(Other(3))) is Other
    assert "it is a Other, which computes something else" in caplog.text


def test_a_shared_layer_stays_one_object_through_all_surgery():
    for shared in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4), FrozenBatchNorm2d(4)):
        model = nn.Sequential(shared, nn.ReLU(), nn.ModuleList([shared]), nn.Sequential(shared))
        cls = type(shared)
        for surgery in (
            bn.convert,
            bn.fuse,
            bn.freeze,
            bn.unfreeze,
            bn.freeze,
            bn.unfreeze,
            bn.unsynchronize,
            bn.revert,
        ):
            surgery(model)
            assert model[0] is model[2][0] is model[3][0] is shared, surgery
        assert type(shared) is cls


def test_pruned_and_parametrized_layers_keep_what_they_have(caplog):
    def build():
        pruned, parametrized = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        prune.l1_unstructured(pruned, "weight", amount=2)
        parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
        parametrized.register_state_dict_post_hook(lambda *given: given[1].update({f"{given[2]}extra": torch.ones(1)}))
        return nn.Sequential(pruned, parametrized)

    model, expected = build(), build()
    classes = [type(layer) for layer in model]
    with caplog.at_level(logging.INFO, "batchnorm"):
        bn.convert(model)
    assert isinstance(model[0], bn.BatchNorm1d)
    assert isinstance(model[1], bn.BatchNorm1d)
    assert "convert: 2 of 2 batch norms changed" in caplog.text
    x = torch.randn(5, 4)
    torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert "1.extra" in model.state_dict()
    bn.fuse(bn.revert(model))
    bn.revert(model)
    assert [type(layer) for layer in model] == classes
    assert len(model[0]._forward_pre_hooks) == 1
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
