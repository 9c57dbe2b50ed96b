"""Gradients of single samples against one backward for each, and opacus' validator and fixer, where opacus is installed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm import privacy
from batchnorm.errors import ArgumentError, InputError, MissingExtraError, StateError
from tests.networks import settle


def network(width=16):
    torch.manual_seed(1)
    return settle(
        nn.Sequential(
            *(
                nn.Conv2d(3, width, 3),
                nn.BatchNorm2d(width, eps=1e-3),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            ),
            *(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)),
        )
    )


def data():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(5, 3, 8, 8, generator=generator), torch.randint(4, (5,), generator=generator)


SEPARATE = {
    "eval": lambda: network().eval(),
    "converted": lambda: bn.convert(network()).eval(),
    "frozen": lambda: bn.freeze(network()),
    "frozen statistics": lambda: bn.freeze(network(), affine=False),
    "group": lambda: bn.convert(network(), to="group"),
    "standardized": lambda: bn.convert(network(), to="group", standardize_weights=True),
    "layer": lambda: bn.convert(network(), to="layer"),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_gradients_of_samples_are_those_of_a_backward_for_each(name):
    model = SEPARATE[name]().double()
    x, target = data()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = privacy.per_sample_gradients(model, F.cross_entropy, x.double(), target)
    assert found.keys() == {key for key, value in model.named_parameters() if value.requires_grad}
    for n in range(5):
        model.zero_grad()
        F.cross_entropy(model(x.double()[n : n + 1]), target[n : n + 1]).backward()
        for key, value in model.named_parameters():
            if value.requires_grad:
                torch.testing.assert_close(found[key][n], value.grad, rtol=1e-9, atol=1e-12, msg=key)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_that_mix_samples_are_named():
    model = nn.Sequential(
        bn.BatchNorm1d(2),
        nn.BatchNorm1d(2, affine=False),
        nn.BatchNorm1d(2, track_running_stats=False).eval(),
        nn.BatchNorm1d(2).eval(),
        bn.freeze(nn.BatchNorm1d(2)),
        nn.GroupNorm(1, 2),
    )
    model[0].weight.requires_grad_(False)
    assert privacy.mixing(model) == ["0", "1", "2"]
    with pytest.raises(StateError, match="but 0, 1, 2 do; call"):
        privacy.per_sample_gradients(model, F.mse_loss, torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ArgumentError):
        privacy.mixing(3)


def test_what_is_named_mixes_and_nothing_else():
    x = torch.randn(6, 3, 8, 8)
    for create in (network, lambda: bn.convert(network()), *SEPARATE.values()):
        model = create()
        with torch.no_grad():
            whole = model(x)[0]
            x[1:] += 10
            changed = not torch.allclose(whole, model(x)[0], rtol=1e-4, atol=1e-4)
            x[1:] -= 10
        assert changed == bool(privacy.mixing(model))


def test_without_opacus_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opacus.validators", None)
    with pytest.raises(MissingExtraError, match="pip install opacus"):
        privacy.use_in_opacus()
    with pytest.raises(InputError, match="at least 2"):
        privacy.use_in_opacus(channels_per_group=1)


@pytest.fixture
def validator(monkeypatch):
    opacus = pytest.importorskip("opacus.validators")
    for name in ("VALIDATORS", "FIXERS"):
        monkeypatch.setattr(opacus.ModuleValidator, name, dict(getattr(opacus.ModuleValidator, name)))
    return opacus.ModuleValidator


class TestOpacus:
    def test_frozen_layers_and_group_norms_are_accepted(self, validator):
        for register in (lambda: None, privacy.use_in_opacus):
            register()
            assert validator.is_valid(bn.freeze(network()))
            assert validator.is_valid(bn.freeze(network(), affine=False))
            assert validator.is_valid(bn.convert(network(), to="group", standardize_weights=True))
            assert not validator.is_valid(network())

    def test_our_batch_norms_are_refused_only_after_registration(self, validator):
        model = bn.convert(network())
        assert validator.is_valid(model)
        assert privacy.mixing(model) == ["1", "6"]
        privacy.use_in_opacus()
        assert len(validator.validate(model)) == 2
        assert validator.is_valid(bn.freeze(model))

    def test_the_fixer_keeps_weights_and_leaves_a_signal(self, validator):
        x = torch.randn(6, 16)
        theirs = validator.fix(network())
        assert (theirs[6].num_groups, theirs[6].num_channels) == (16, 16)
        torch.testing.assert_close(theirs[6](x), theirs[6].bias.expand(6, 16), atol=1e-3, rtol=0)  # nothing is left
        privacy.use_in_opacus()
        for model in (network(), bn.convert(network())):
            ours = validator.fix(model)
            assert (ours[1].num_groups, ours[6].num_groups) == (2, 2)
            assert ours[1].eps == 1e-3
            torch.testing.assert_close(ours[6].weight, model[6].weight)
            assert ours[6](x).std(0).min() > 0.1 * ours[6].weight.abs().min()
            assert validator.is_valid(ours)
            assert not validator.is_valid(model)  # `fix` works on a copy
        with pytest.raises(InputError, match="it has 4 channels, fewer than a group of 8"):
            validator.fix(network(4))
        privacy.use_in_opacus(channels_per_group=2)
        assert validator.fix(network(4))[1].num_groups == 2
        assert type(validator.fix(bn.freeze(network(), affine=False))[1]) is bn.BatchNorm2d

    def test_it_refuses_trainable_layers_with_buffers(self, validator):
        from opacus import GradSampleModule

        for model in (bn.convert(network()), bn.freeze(network(), affine=False)):
            with pytest.raises(NotImplementedError, match="trainable layer with buffers"):
                GradSampleModule(model)

    @pytest.mark.parametrize("name", ["frozen", "group", "standardized", "layer"])
    @pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
    def test_its_gradients_of_samples_are_ours(self, validator, name):
        from opacus import GradSampleModule

        x, target = data()
        wanted = privacy.per_sample_gradients(SEPARATE[name](), F.cross_entropy, x, target)
        wrapped = GradSampleModule(SEPARATE[name](), loss_reduction="sum")
        F.cross_entropy(wrapped(x), target, reduction="sum").backward()
        for key, value in wrapped._module.named_parameters():
            if value.requires_grad:
                torch.testing.assert_close(value.grad_sample, wanted[key], rtol=1e-4, atol=1e-5, msg=key)
