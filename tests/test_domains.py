"""Domains: separate running statistics, chosen by a context."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.statistics import Batch, Domains, Ghost, MovingAverage, Renorm
from tests.budget import assert_same_bits

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
BOTH = Domains(("real", "fake"))


def assert_statistics(layer: nn.Module, suffix: str, plain: nn.Module) -> None:
    for name in BUFFERS:
        assert_same_bits(name, getattr(layer, name + suffix), getattr(plain, name))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("within", [None, Renorm(warmup=1), Ghost(2), MovingAverage(2, warmup=1)], ids=repr)
def test_each_domain_is_a_layer_of_its_own_with_shared_weights(within, momentum):
    layer = bn.BatchNorm2d(3, momentum=momentum, statistics=Domains(["real", "fake"], within))
    alone = {name: bn.BatchNorm2d(3, momentum=momentum, statistics=within) for name in ("real", "fake")}
    for step, name in enumerate(["real", "fake", "fake", "real", "fake"]):
        x = (torch.randn(4, 3, 5, 2) * (step + 1) + step).requires_grad_()
        with bn.domain(name):
            y = layer(x)
        expected = alone[name](x)
        assert_same_bits("y", y, expected)
        dy = torch.randn_like(x)
        assert_same_bits("dx", *(torch.autograd.grad(value, x, dy)[0] for value in (y, expected)))
        assert_statistics(layer, "", alone["real"])
        assert_statistics(layer, "_fake", alone["fake"])
    layer.eval()
    x = torch.randn(4, 3, 5, 2)
    with bn.domain("fake"):
        assert_same_bits("inferred", layer(x), alone["fake"].eval()(x))
    assert_same_bits("the first is the default", layer(x), alone["real"].eval()(x))


def test_contexts_nest_and_end_with_an_error():
    layer = bn.BatchNorm1d(3, statistics=BOTH)
    with bn.domain("fake"):
        with bn.domain("real"):
            layer(torch.randn(4, 3))
        assert (layer.num_batches_tracked, layer.num_batches_tracked_fake) == (1, 0)
        layer(torch.randn(4, 3))
    with pytest.raises(ZeroDivisionError), bn.domain("fake"):
        _ = 1 / 0
    layer(torch.randn(4, 3))
    assert (layer.num_batches_tracked, layer.num_batches_tracked_fake) == (2, 1)


def test_a_domain_is_one_threads_own():
    layer = bn.BatchNorm1d(3, statistics=BOTH)
    with bn.domain("fake"):
        thread = threading.Thread(target=lambda: layer(torch.randn(4, 3)))
        thread.start()
        thread.join()
    assert (layer.num_batches_tracked, layer.num_batches_tracked_fake) == (1, 0)


def test_compiled_code_follows_the_context():
    layer, eager = (bn.BatchNorm1d(3, statistics=BOTH) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for name in ("real", "fake", "real", "fake", "fake"):
        x = torch.randn(4, 3)
        with bn.domain(name):
            torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    assert layer.num_batches_tracked_fake == 3


def trained() -> bn.BatchNorm1d:
    layer = bn.BatchNorm1d(3, statistics=BOTH)
    layer(torch.randn(4, 3) + 1)
    with bn.domain("fake"):
        layer(torch.randn(4, 3) - 1)
    return layer


def test_copies_and_checkpoints_hold_every_domain():
    layer = trained()
    loaded = bn.BatchNorm1d(3, statistics=BOTH)
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
        with bn.domain("fake"):
            other(torch.randn(4, 3))
        assert (other.num_batches_tracked_fake, layer.num_batches_tracked_fake) == (2, 1)


def test_a_plain_checkpoint_is_where_every_domain_starts():
    plain = nn.BatchNorm1d(3)
    plain(torch.randn(4, 3) + 2)
    layer = trained()
    layer.load_state_dict(plain.state_dict())
    assert_statistics(layer, "", plain)
    assert_statistics(layer, "_fake", plain)
    lazy = bn.LazyBatchNorm1d(statistics=BOTH)
    lazy.load_state_dict(plain.state_dict())
    assert_statistics(lazy, "_fake", plain)


def test_a_checkpoint_older_than_the_counter_loads():
    state = dict(nn.BatchNorm1d(3).state_dict())
    del state["num_batches_tracked"]
    layer = trained()
    layer.load_state_dict(state)
    assert not layer.running_mean_fake.any()


def test_checkpoints_of_domains_load_into_any_part_of_ours_and_after_revert_into_torchs():
    layer = trained()
    plain = bn.BatchNorm1d(3)
    plain.load_state_dict(layer.state_dict())
    assert_statistics(layer, "", plain)
    others = bn.BatchNorm1d(3, statistics=Domains(("real", "painted")))
    others.load_state_dict(layer.state_dict())
    assert_statistics(others, "_painted", plain)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    keys = list(model.state_dict())
    bn.convert(model, statistics=BOTH)
    assert "1.running_mean_fake" in model.state_dict()
    bn.revert(model)
    assert type(model[1]) is nn.BatchNorm1d
    assert list(model.state_dict()) == keys


def test_convert_starts_every_domain_from_what_was_learned():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model(torch.randn(4, 3) + 2)
    before = copy.deepcopy(model[0])
    bn.convert(model, statistics=BOTH)
    assert_statistics(model[0], "_fake", before)
    model[0].statistics = Batch()
    assert set(model[0].state_dict()) == set(before.state_dict())


def test_lazy_layers_know_their_domains():
    layer = bn.LazyBatchNorm1d(statistics=BOTH)
    with bn.domain("fake"):
        layer(torch.randn(4, 3))
    assert layer.running_mean_fake.shape == (3,)
    assert (layer.num_batches_tracked, layer.num_batches_tracked_fake) == (0, 1)


def test_reset_and_casts_reach_every_domain():
    layer = trained().half()
    assert layer.running_mean_fake.dtype == layer.running_var_fake.dtype == torch.float32
    layer.reset_running_stats()
    assert_statistics(layer, "", nn.BatchNorm1d(3))
    assert_statistics(layer, "_fake", nn.BatchNorm1d(3))


def test_frozen_layers_keep_and_use_every_domain():
    layer = trained()
    x = torch.randn(4, 3)
    with bn.domain("fake"):
        expected = layer.eval()(x)
        bn.freeze(layer).train()
        assert_same_bits("frozen", layer(x), expected)
    state = copy.deepcopy(layer.state_dict())
    assert bn.unfreeze(layer).statistics == BOTH
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)


def test_copy_statistics_takes_the_domains_along():
    layer, average = trained(), bn.BatchNorm1d(3, statistics=BOTH)
    bn.copy_statistics(layer, average)
    torch.testing.assert_close(average.state_dict(), layer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a", ""), ("a", "b.c")], ids=str)
def test_names_that_cannot_be_buffers(names):
    with pytest.raises(InputError, match="names must be"):
        Domains(names)


def test_what_domains_refuse():
    with pytest.raises(ArgumentError, match="sequence of strings"):
        Domains("real")
    with pytest.raises(ArgumentError, match="within must be a statistics source"):
        Domains(("a", "b"), Domains(("c", "d")))
    with pytest.raises(ArgumentError, match="must be a string"), bn.domain(True):
        pass
    layer = bn.BatchNorm1d(3, statistics=BOTH)
    with bn.domain("painted"), pytest.raises(InputError, match="one of the layer's, 'real', 'fake'"):
        layer(torch.randn(4, 3))
    with bn.domain("painted"):
        bn.BatchNorm1d(3)(torch.randn(4, 3))  # has no domains, and does not mind
    with pytest.raises(StateError, match="track_running_stats=True"):
        bn.BatchNorm1d(3, track_running_stats=False, statistics=BOTH)(torch.randn(4, 3))


def test_each_domain_has_windows_of_its_own():
    part = Domains(("real", "fake"), within=MovingAverage(window=2, warmup=0))
    plain = nn.BatchNorm1d(3)
    for _ in range(9):
        plain(torch.randn(8, 3) + 40)
    layer = bn.BatchNorm1d(3, statistics=part)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.running_mean_window_fake, plain.running_mean.expand(2, 3))
    assert not layer.running_mean_gradient_fake.any()
    with bn.domain("fake"):
        layer(torch.randn(8, 3, requires_grad=True)).square().sum().backward()
    assert torch.equal(layer.running_mean_window, plain.running_mean.expand(2, 3))
    assert layer.running_var_gradient_fake.any()
    assert not layer.running_var_gradient.any()
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert_same_bits("window", again.running_mean_window_fake, layer.running_mean_window_fake)
    lazy = bn.LazyBatchNorm1d(statistics=part)
    lazy.load_state_dict(layer.state_dict())
    assert_same_bits("lazy", lazy.running_mean_window_fake, layer.running_mean_window_fake)
    bn.freeze(layer)
    bn.unfreeze(layer)
    assert_same_bits("unfrozen", layer.running_mean_window_fake, again.running_mean_window_fake)
    with pytest.raises(InputError, match="'window'"):
        Domains(("real", "window"), within=MovingAverage())


def test_copies_from_a_plain_layer_are_where_every_domain_starts():
    source, target = nn.BatchNorm1d(3), trained()
    source(torch.randn(8, 3) + 40)
    bn.copy_statistics(source, target)
    assert_statistics(target, "", source)
    assert_statistics(target, "_fake", source)


@pytest.mark.parametrize("within", [None, MovingAverage(2)], ids=repr)
def test_an_assigned_checkpoint_gives_every_domain_memory_of_its_own(within):
    layer = bn.BatchNorm1d(3, statistics=Domains(("real", "fake"), within))
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict(), assign=True)
    with bn.domain("fake"):
        layer(torch.randn(4, 3) + 5)
    assert_statistics(layer, "", nn.BatchNorm1d(3))
    assert layer.running_mean_fake.any()
    places = [buffer.data_ptr() for buffer in layer.buffers()]
    assert len(set(places)) == len(places)
