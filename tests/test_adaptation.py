"""Test-time adaptation against the formulas of the papers, in float64 and plain torch."""

import copy
import math

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import adaptation
from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.statistics import Mixed

EXACT = {"rtol": 1e-10, "atol": 1e-10}
SGD = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)}


def network(classes=4):
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes), nn.BatchNorm1d(classes)
    )
    model = model.double()
    for _ in range(30):
        model(torch.randn(64, 6, dtype=torch.float64))
    with torch.no_grad():
        model[4].weight.mul_(2)
    return model.eval()


def shifted(samples=32):
    return 3 * torch.randn(samples, 6, dtype=torch.float64) + 2


def by_batch(model):
    """The model as TENT configures it: in training mode, without running statistics, so without updates."""
    other = copy.deepcopy(model).train()
    for layer in (other[1], other[4]):
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return other, [value for layer in (other[1], other[4]) for value in (layer.weight, layer.bias)]


def entropies(outputs):
    return -(outputs.softmax(1) * outputs.log_softmax(1)).sum(1)


def affine_of(adapted):
    return [value for layer in (adapted.model[1], adapted.model[4]) for value in (layer.weight, layer.bias)]


class TestMixed:
    @pytest.mark.parametrize("prior", [0.5, 16.0])
    def test_equation_1(self, prior):
        layer = bn.BatchNorm2d(3, statistics=Mixed(prior), dtype=torch.float64)
        layer(torch.randn(8, 3, 4, 4, dtype=torch.float64) + 1)
        layer.eval()
        x, share = 2 * torch.randn(5, 3, 4, 4, dtype=torch.float64) - 1, 5 / (prior + 5)
        before = {name: value.clone() for name, value in layer.named_buffers()}
        mean = (1 - share) * layer.running_mean + share * x.mean((0, 2, 3))
        variance = (1 - share) * layer.running_var + share * x.var((0, 2, 3), correction=0)
        expected = (x - mean.view(3, 1, 1)) / (variance + layer.eps).sqrt().view(3, 1, 1)
        torch.testing.assert_close(layer(x), expected, **EXACT)
        assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())

    def test_its_ends_are_the_batch_and_the_running_statistics(self):
        layer = bn.BatchNorm1d(3, dtype=torch.float64)
        layer(torch.randn(8, 3, dtype=torch.float64) + 1)
        x = torch.randn(6, 3, dtype=torch.float64)
        training, inference = copy.deepcopy(layer)(x), copy.deepcopy(layer).eval()(x)
        layer.eval()
        for source, expected in ((Mixed(0), training), (Mixed(math.inf), inference), (Mixed(0, smallest=7), inference)):
            layer.statistics = source
            torch.testing.assert_close(layer(x), expected, **EXACT)
        layer.statistics = Mixed(0)
        assert layer(x[:1]).isfinite().all()

    def test_masks_and_lengths(self):
        layer = bn.BatchNorm1d(3, statistics=Mixed(4), dtype=torch.float64).eval()
        x = torch.randn(5, 3, 7, dtype=torch.float64)
        x[:, :, 4:] = torch.nan
        y = layer(x, lengths=torch.full((5,), 4))
        torch.testing.assert_close(y[:, :, :4], layer(x[:, :, :4]), **EXACT)

    def test_wrong_arguments(self):
        for wrong in ({"prior": -1}, {"prior": math.nan}, {"smallest": 0}):
            with pytest.raises(InputError, match="prior must be at least 0"):
                Mixed(**wrong)
        with pytest.raises(StateError, match="track_running_stats"):
            bn.BatchNorm1d(2, track_running_stats=False, statistics=Mixed()).eval()(torch.randn(4, 2))


class TestMethods:
    def test_statistics_are_those_of_the_batch(self):
        model = network()
        adapted = bn.adapt(model, "statistics", guard=False)
        for _ in range(2):
            x = shifted()
            torch.testing.assert_close(adapted(x), by_batch(model)[0](x), **EXACT)
        assert not torch.allclose(adapted(x), model(x))

    def test_tent_descends_the_entropy(self):
        model = network()
        adapted = bn.adapt(model, "tent", guard=False, **SGD)
        other, parameters = by_batch(model)
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for _ in range(3):
            x = shifted()
            outputs = other(x)
            torch.testing.assert_close(adapted(x), outputs, **EXACT)
            optimizer.zero_grad()
            entropies(outputs).mean().backward()
            optimizer.step()
        for value, expected in zip(affine_of(adapted), parameters, strict=True):
            torch.testing.assert_close(value, expected, **EXACT)
        assert torch.equal(adapted.model[0].weight, model[0].weight)

    def test_sar_steps_from_the_sharpest_point_nearby_with_reliable_samples(self):
        model, margin = network(), 0.4 * math.log(4)
        adapted = bn.adapt(model, "sar", guard=False, **SGD)
        other, parameters = by_batch(model)
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for _ in range(3):
            x = shifted(64)
            outputs = other(x)
            torch.testing.assert_close(adapted(x), outputs, **EXACT)
            reliable = entropies(outputs) < margin
            assert 0 < reliable.sum() < 64
            slopes = torch.autograd.grad(entropies(outputs)[reliable].mean(), parameters)
            length = torch.cat([slope.flatten() for slope in slopes]).norm()
            weights = [value.detach().clone() for value in parameters]
            with torch.no_grad():
                for value, slope in zip(parameters, slopes, strict=True):
                    value.add_(0.05 * slope / length)
            there = entropies(other(x))[reliable]
            optimizer.zero_grad()
            there[there < margin].mean().backward()
            with torch.no_grad():
                for value, weight in zip(parameters, weights, strict=True):
                    value.copy_(weight)
            optimizer.step()
        for value, expected in zip(affine_of(adapted), parameters, strict=True):
            torch.testing.assert_close(value, expected, **EXACT)

    def test_the_model_does_not_change_and_reset_begins_anew(self):
        model = network().train()
        before = copy.deepcopy(model.state_dict())
        adapted = bn.adapt(model, "tent", guard=False, **SGD)
        x = shifted()
        first = adapted(x)
        second = adapted(x)
        assert not torch.allclose(first, second)
        assert entropies(second).mean() < entropies(first).mean()
        adapted.reset()
        assert torch.equal(adapted(x), first)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model.training
        assert type(model[1]) is nn.BatchNorm1d

    def test_in_inference_mode_and_without_gradients(self):
        adapted = bn.adapt(network(), "sar", guard=False, **SGD).train()
        assert not adapted.training
        with torch.inference_mode():
            x = shifted()
            first, second = adapted(x), adapted(x)
        assert not torch.allclose(first, second)
        assert not first.requires_grad

    def test_any_output(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = network()

            def forward(self, *, x):
                return {"logits": self.inner(x)}

        x = shifted()
        assert bn.adapt(Named(), guard=False)(x=x)["logits"].shape == (32, 4)
        adapted = bn.adapt(Named(), "tent", logits=lambda output: output["logits"])
        assert adapted(x=x)["logits"].shape == (32, 4)
        with pytest.raises(ArgumentError, match="pass logits="):
            bn.adapt(Named(), "tent")(x=x)


class TestSafety:
    def test_the_guard_stays_with_the_surer_model(self):
        model = network()
        with torch.no_grad():
            model[4].weight.fill_(3)
        same = 8 * torch.randn(1, 6, dtype=torch.float64) + 0.01 * torch.randn(32, 6, dtype=torch.float64)
        adapted, unguarded = bn.adapt(model), bn.adapt(model, guard=False)
        expected = model(same).argmax(1)
        torch.testing.assert_close(adapted(same), model(same), **EXACT)
        assert adapted.guarded == 1
        assert (unguarded(same).argmax(1) == expected).float().mean() < 0.9

    def test_a_sure_adapted_model_is_not_overruled_by_a_surer_one(self, monkeypatch):
        """As at low contrast, where the trained model is sure of one class for everything."""
        model, x = network(), shifted()
        for entropy, guarded in ((0.05, 0), (0.15, 1)):  # of ln C; the same for both models
            monkeypatch.setattr(adaptation._Predictions, "entropy", lambda _, value=entropy: value * math.log(4))
            adapted = bn.adapt(model)
            adapted(x)
            assert adapted.guarded == guarded

    def test_what_the_guard_answers_is_not_learned_from(self, monkeypatch):
        adapted = bn.adapt(network(), "tent", **SGD)
        before = [value.clone() for value in affine_of(adapted)]
        monkeypatch.setattr(adaptation._Predictions, "entropy", lambda _: 1.0)  # a tie
        adapted(shifted())
        assert adapted.guarded == 1
        assert all(torch.equal(*pair) for pair in zip(before, affine_of(adapted), strict=True))

    @pytest.mark.parametrize("method", ["tent", "sar"])
    def test_small_batches_are_normalized_by_running_statistics_and_not_learned_from(self, method):
        model = network()
        adapted = bn.adapt(model, method, smallest=8, guard=False, **SGD)
        for size in (1, 7):
            x = shifted(size)
            torch.testing.assert_close(adapted(x), model(x), **EXACT)
        assert all(torch.equal(*pair) for pair in zip(adapted._trained.values(), affine_of(adapted), strict=True))

    @pytest.mark.parametrize("method", ["tent", "sar"])
    def test_a_collapse_is_undone(self, method):
        """Nothing but the last bias learns here, so that all predictions become one class."""
        model = network()
        adapted = bn.adapt(model, method, guard=False, optimizer=lambda p: torch.optim.SGD([[*p][-1]], lr=5.0))
        for _ in range(60):
            adapted(shifted())
            if adapted.recovered:
                break
        assert adapted.recovered == 1
        assert all(torch.equal(*pair) for pair in zip(adapted._trained.values(), affine_of(adapted), strict=True))

    def test_weights_that_are_not_finite_are_undone(self):
        model = network()
        adapted = bn.adapt(model, "tent", guard=False, optimizer=lambda p: torch.optim.SGD(p, lr=math.inf))
        adapted(shifted())
        x = shifted()
        torch.testing.assert_close(adapted(x), model(x), **EXACT)
        assert adapted.recovered == 1

    def test_what_it_leaves(self, caplog):
        model = network()
        bn.freeze(model[1:2])
        bn.adapt(model)
        assert "1 of 2 batch norms adapt; left 1" in caplog.text
        with pytest.raises(StateError, match="has none"):
            bn.adapt(nn.Linear(2, 2))

    def test_wrong_arguments(self):
        with pytest.raises(InputError, match="one of 'statistics'"):
            bn.adapt(network(), "note")
        with pytest.raises(ArgumentError, match=r"torch\.nn\.Module"):
            bn.adapt(print)
