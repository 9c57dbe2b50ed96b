"""Averages of weights and target networks: their running statistics fit their own weights, whoever updates these."""

import importlib
import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm as bn
from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.statistics import Domains

DECAY = 0.9
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3)).double()


class LikeTimm(nn.Module):
    """As timm's ModelEmaV3: averages everything in the state_dict."""

    def __init__(self, model):
        super().__init__()
        self.module = deepcopy(model).eval()

    @torch.no_grad()
    def update(self, model):
        for mine, other in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mine.lerp_(other, 1 - DECAY) if mine.is_floating_point() else mine.copy_(other)


class LikeEmaPytorch(nn.Module):
    """As ema-pytorch's EMA: has the model too, writes through `.data`, and not in every step."""

    def __init__(self, model):
        super().__init__()
        self.online_model, self.ema_model, self.steps = model, deepcopy(model), 0

    def update(self, _):
        self.steps += 1
        if self.steps % 2 == 0:
            for mine, other in zip(self.ema_model.parameters(), self.online_model.parameters(), strict=True):
                mine.data.lerp_(other.data, 1 - DECAY)

    def forward(self, x):
        return self.ema_model(x)


class LikeLoops(nn.Module):
    """A copy of the model that a loop of one's own averages."""

    def __new__(cls, model):
        average = deepcopy(model)
        average.update = lambda model: [
            mine.data.copy_(DECAY * mine + (1 - DECAY) * other)
            for mine, other in zip(average.parameters(), model.parameters(), strict=True)
        ]
        return average


def averaged(**options):
    return lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), **options)


def package(name, make):
    def real(model):
        found = pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ModuleNotFoundError)
        return make(found, model)

    return real


WRAPPERS = {
    "AveragedModel": averaged(),
    "with buffers": averaged(use_buffers=True),
    "like timm": LikeTimm,
    "like ema-pytorch": LikeEmaPytorch,
    "a loop": LikeLoops,
    "timm": package("timm.utils.model_ema", lambda timm, model: timm.ModelEmaV3(model, decay=DECAY)),
    "ema-pytorch": package(
        "ema_pytorch", lambda ema, model: ema.EMA(model, beta=DECAY, update_every=1, update_after_step=2)
    ),
}


def update(average, model):
    step = getattr(average, "update_parameters", None) or average.update
    step() if type(average).__module__.startswith("ema_pytorch") else step(model)


def training(model, steps, average=None):
    """Trains, and yields the batch after each update of the average."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(steps):
        x = torch.randn(16, 4, dtype=torch.float64) * torch.rand(4, dtype=torch.float64) + 3
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x), (x[:, 0] * x[:, 1] > 9).long()).backward()
        optimizer.step()
        if average is not None:
            update(average, model)
        yield x


def statistics_of(model):
    return {key: value for key, value in model.state_dict().items() if "running" in key}


class TestRecalibrated:
    @pytest.mark.parametrize("name", WRAPPERS)
    def test_inference_is_that_of_a_recalibrated_copy_after_any_number_of_steps(self, name):
        model = network()
        average = WRAPPERS[name](model)
        inner = bn.track(model, average, batches=3).copy
        seen, start = [], [value.detach().clone() for value in inner.parameters()]
        for step, x in enumerate(training(model, 9, average)):
            seen.append(x)
            if step in (0, 1, 4, 8):
                exact = bn.recalibrate(deepcopy(inner), seen[-3:]).eval()
                average.eval()
                moved = any(not torch.equal(*pair) for pair in zip(inner.parameters(), start, strict=True))
                if moved:  # not after one step, if the wrapper updates in every second one
                    torch.testing.assert_close(inner(x), exact(x), **EXACT)
        assert moved

    def test_it_waits_for_an_inference_and_is_done_once(self, monkeypatch):
        model, done = network(), []
        average = averaged()(model)
        bn.track(model, average)
        module = importlib.import_module("batchnorm.copies")
        real = module.recalibrate_alone
        monkeypatch.setattr(module, "recalibrate_alone", lambda *given: (done.append(len(given[1])), real(*given)))
        *_, x = training(model, 20, average)
        assert done == []
        average.eval()
        average(average(x)[:, :1].expand(-1, 4))
        assert done == [16]
        with torch.inference_mode():
            for x in training_with_grad(model, average):
                average(x)
        assert done == [16, 16]
        assert not any(value.is_inference() for value in average.buffers())

    def test_every_so_many_changes(self):
        model = network()
        average = averaged()(model)
        tracker = bn.track(model, average, every=3)
        average.eval()
        renewed = []
        for x in training(model, 7, average):
            before = statistics_of(average)["module.1.running_var"].clone()
            own = model[1].running_var.clone()  # which AveragedModel copies with every update
            average(x)
            renewed.append(not torch.equal(average.module[1].running_var, own))
            assert torch.equal(before, own)
        assert renewed == [False, False, True, False, False, True, False]
        tracker.refresh()
        assert not torch.equal(average.module[1].running_var, model[1].running_var)

    def test_before_the_first_batch_it_copies(self):
        model = network()
        for _ in training(model, 3):
            pass
        average = network()
        bn.track(model, average)
        average.load_state_dict(dict(model.named_parameters()), strict=False)
        average.eval()(torch.randn(4, 4, dtype=torch.float64))
        assert torch.equal(average[1].running_mean, model[1].running_mean)

    def test_a_model_with_keywords_and_its_converted_average(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(4).double()

            def forward(self, x, *, scale):
                return self.norm(x * scale)

        model = Named()
        average = averaged(use_buffers=True)(model)
        bn.convert(model)
        bn.track(model, average)
        x = torch.randn(9, 4, dtype=torch.float64)
        model(x, scale=3.0)
        with torch.no_grad():
            model.norm.weight.mul_(2)
        average.update_parameters(model)
        average.eval()(x, scale=3.0)
        torch.testing.assert_close(average.module.norm.running_var, (3 * x).var(0), **EXACT)


def training_with_grad(model, average):
    with torch.inference_mode(False):
        yield from training(model, 1, average)


class TestCopiedAndAveraged:
    @pytest.mark.parametrize("name", ["AveragedModel", "with buffers", "like timm", "a loop"])
    def test_statistics_move_as_weights_do(self, name):
        model = network()
        average = WRAPPERS[name](model)
        tracker = bn.track(model, average, method="average", decay=DECAY)
        expected = {key: value.clone() for key, value in statistics_of(model).items()}
        for _ in training(model, 4, average):
            for key, value in statistics_of(model).items():
                expected[key] = DECAY * expected[key] + (1 - DECAY) * value
        tracker.refresh()
        for key, value in statistics_of(tracker.copy).items():
            torch.testing.assert_close(value, expected[key], **EXACT)
        assert tracker.copy[1].num_batches_tracked == 4

    def test_a_replaced_target_has_the_statistics_of_that_moment(self):
        """Although the model has been trained on more batches when the target is called."""
        model, target = network(), network()
        bn.track(model, target, method="copy")
        for _ in training(model, 2):
            pass
        target.load_state_dict(dict(model.named_parameters()), strict=False)
        then = {key: value.clone() for key, value in statistics_of(model).items()}
        for _ in training(model, 2):
            pass
        target.eval()(torch.randn(2, 4, dtype=torch.float64))
        assert all(torch.equal(value, then[key]) for key, value in statistics_of(target).items())

    @pytest.mark.parametrize("method", ["average", "copy", "recalibrate"])
    def test_polyak(self, method):
        model, target = network(), network()
        tracker = bn.track(model, target, method=method, decay=0.75 if method == "average" else None)
        for _ in training(model, 3):
            pass
        weight, mean = target[0].weight.detach().clone(), target[1].running_mean.clone()
        tracker.polyak(0.25)
        torch.testing.assert_close(target[0].weight, 0.75 * weight + 0.25 * model[0].weight, **EXACT)
        tracker.refresh()
        expected = {"average": 0.75 * mean + 0.25 * model[1].running_mean, "copy": model[1].running_mean}
        if method in expected:
            torch.testing.assert_close(target[1].running_mean, expected[method], **EXACT)
        else:
            assert not torch.equal(target[1].running_mean, mean)
        tracker.polyak(1)
        if method != "recalibrate":
            assert all(torch.equal(value, statistics_of(model)[key]) for key, value in statistics_of(target).items())
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), target.parameters(), strict=True))

    def test_domains_of_the_copy(self):
        model = bn.BatchNorm1d(2, statistics=Domains(("a", "b")), dtype=torch.float64)
        target = deepcopy(model)
        tracker = bn.track(model, target, method="copy")
        with bn.domain("b"):
            model(torch.randn(8, 2, dtype=torch.float64) + 5)
        tracker.polyak(1.0)
        assert torch.equal(target.running_mean_b, model.running_mean_b)
        assert target.running_mean_b.ne(0).all()


class TestTracking:
    def test_a_copy_or_a_pickle_of_the_average_is_not_tracked(self):
        model = network()
        average = averaged()(model)
        bn.track(model, average)
        *_, x = training(model, 2, average)
        for other in (deepcopy(average.module), pickle.loads(pickle.dumps(average.module))):
            before = other[1].running_var.clone()
            other.eval()(x)
            assert torch.equal(other[1].running_var, before)

    def test_stop(self):
        model = network()
        average = averaged()(model)
        tracker = bn.track(model, average)
        tracker.stop()
        *_, x = training(model, 2, average)
        average.eval()(x)
        assert torch.equal(average.module[1].running_var, model[1].running_var)  # as AveragedModel left it
        assert not average.module._forward_pre_hooks
        assert not model._forward_pre_hooks

    def test_what_it_does_not_take(self):
        model = network()
        with pytest.raises(InputError, match="needs decay"):
            bn.track(model, network(), method="average")
        with pytest.raises(InputError, match="one of 'recalibrate'"):
            bn.track(model, network(), method="swa")
        with pytest.raises(InputError, match="between 0 and 1"):
            bn.track(model, network(), decay=2.0)
        with pytest.raises(InputError, match="batches must be an integer"):
            bn.track(model, network(), batches=0)
        with pytest.raises(StateError, match="but it is the model"):
            bn.track(model, model)
        with pytest.raises(StateError, match="2 has none"):
            bn.track(model, nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8)))
        with pytest.raises(ArgumentError, match="averages weights"):
            bn.track(model, {})
        with pytest.raises(InputError, match="needs tau"):
            bn.track(model, network()).polyak()
