"""Population statistics against those of all data in one, computed by hand in float64; and a model left as it was when it fails."""

from __future__ import annotations

import copy
import itertools
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.errors import ArgumentError, InputError, StateError
from batchnorm.population import Progress, recalibrating
from batchnorm.population.lineage import Lineage
from batchnorm.statistics import MovingAverage

METHODS = ("joint", "layerwise")


def pooled(values, *, unbiased=True):
    """Mean and variance of each channel of (N, C, *S), two passes in float64."""
    flat = values.double().movedim(1, -1).flatten(0, -2)
    mean = flat.mean(0)
    return mean, (flat - mean).square().sum(0) / (len(flat) - unbiased)


def close(layer, values, tolerance=1e-12, **options):
    for buffer, wanted in zip((layer.running_mean, layer.running_var), pooled(values, **options), strict=True):
        scale = wanted.abs().max() + (values.abs().max() if buffer is layer.running_mean else 0)
        error = (buffer.double() - wanted).abs().max()
        assert error <= tolerance * scale, (buffer, wanted)


def clusters(batches=10, size=8, C=3):
    """Batches that vary little inside, and lie far apart."""
    generator = torch.Generator().manual_seed(0)
    return [
        0.05 * torch.randn(size, C, generator=generator, dtype=torch.float64)
        + torch.randn(1, C, generator=generator, dtype=torch.float64)
        for _ in range(batches)
    ]


def network(kind=nn.BatchNorm1d):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(3, 5), kind(5), nn.ReLU(), nn.Linear(5, 4), kind(4), nn.Tanh(), nn.Linear(4, 6), kind(6)
    ).double()


def state(model):
    """All that must not change: buffers and parameters bit by bit, modes, hooks, attributes."""
    return (
        {name: value.clone() for name, value in itertools.chain(model.named_parameters(), model.named_buffers())},
        [module.training for module in model.modules()],
        [
            {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
            | {
                "hooks": (
                    dict(module._forward_pre_hooks),
                    dict(module._forward_hooks),
                    module._forward_hooks_with_kwargs,
                )
            }
            for module in model.modules()
        ],
    )


def same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value.nan_to_num(7), after[0][name].nan_to_num(7)), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, bn.BatchNorm1d], ids=["torch", "ours"])
class TestOneLayer:
    def test_clustered_batches_give_the_pooled_variance(self, layer, method):
        batches = clusters()
        norm = layer(3).double()
        assert bn.recalibrate(norm, batches, method=method) is norm
        close(norm, torch.cat(batches))
        inside = torch.stack([batch.var(0) for batch in batches]).mean()
        assert inside < 0.02 * norm.running_var.mean()  # what a mean of variances would have said

    def test_a_mean_far_from_zero_in_float32(self, layer, method):
        batches = [(torch.randn(64, 3) + 1e4) for _ in range(20)]
        norm = bn.recalibrate(layer(3), batches, method=method)
        close(norm, torch.cat(batches), 1e-5)
        assert (norm.running_var - 1).abs().max() < 0.2

    def test_batches_of_one_and_an_odd_one_at_the_end(self, layer, method):
        data = torch.randn(9, 3, dtype=torch.float64)
        for sizes in ([1] * 9, [4, 4, 1], [0, 9]):
            norm = bn.recalibrate(layer(3).double(), list(data.split(sizes)), method=method)
            close(norm, data)

    def test_half_precision_input(self, layer, method):
        batches = [torch.randn(16, 3).bfloat16() + 8 for _ in range(4)]
        norm = bn.recalibrate(layer(3), batches, method=method)
        close(norm, torch.cat(batches), 1e-6)


def test_torchs_update_bn_leaves_out_what_lies_between_the_batches():
    """What the acceptance of `recalibrate` is about, on the same data; also that the data can tell the two apart."""
    batches = clusters()
    norm = nn.BatchNorm1d(3).double()
    torch.optim.swa_utils.update_bn(batches, norm)
    assert (norm.running_var / torch.cat(batches).var(0)).max() < 0.02


class TestOptions:
    def test_the_biased_running_variance(self):
        batches = clusters()
        norm = bn.recalibrate(bn.BatchNorm1d(3, dtype=torch.float64, running_variance="biased"), batches)
        close(norm, torch.cat(batches), unbiased=False)

    def test_channels_last_axis(self):
        x = torch.randn(4, 7, 3, dtype=torch.float64)
        norm = bn.recalibrate(bn.BatchNorm(3, channel_axis=-1, dtype=torch.float64), x.split(2))
        close(norm, x.movedim(-1, 1))

    def test_complex_input(self):
        x = torch.randn(12, 3, dtype=torch.complex128)
        norm = bn.recalibrate(bn.BatchNorm1d(3, dtype=torch.complex128), x.split(4))
        mean, variance = pooled(torch.view_as_real(x).flatten(1))
        torch.testing.assert_close(torch.view_as_real(norm.running_mean).flatten(), mean)
        torch.testing.assert_close(torch.view_as_real(norm.running_var).flatten(), variance)

    @pytest.mark.parametrize("statistics", [bn.statistics.Ghost(3), bn.statistics.Renorm(warmup=0)], ids=str)
    def test_parts(self, statistics):
        batches = clusters()
        norm = bn.BatchNorm1d(3, statistics=statistics, dtype=torch.float64)
        close(bn.recalibrate(norm, batches), torch.cat(batches))

    @pytest.mark.parametrize("method", METHODS)
    def test_the_domain_that_the_call_stands_in(self, method):
        batches = clusters()
        norm = bn.BatchNorm1d(3, statistics=bn.statistics.Domains(("real", "fake")), dtype=torch.float64)
        before = {name: value.clone() for name, value in norm.state_dict().items()}
        with bn.domain("fake"):
            bn.recalibrate(norm, batches, method=method)
        data = torch.cat(batches)
        torch.testing.assert_close(norm.get_buffer("running_mean_fake"), data.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.get_buffer("running_var_fake"), data.var(0), rtol=1e-12, atol=1e-12)
        others = {name: value for name, value in norm.state_dict().items() if not name.endswith("fake")}
        assert all(torch.equal(value, before[name]) for name, value in others.items())
        with bn.domain("other"), pytest.raises(InputError, match="other"):
            bn.recalibrate(norm, batches, method=method)

    def test_limit(self):
        batches = clusters()
        close(bn.recalibrate(bn.BatchNorm1d(3).double(), batches, limit=4), torch.cat(batches[:4]))
        read = iter(batches)
        bn.recalibrate(bn.BatchNorm1d(3).double(), read, limit=4)
        assert torch.equal(next(read), batches[4])

    @pytest.mark.parametrize("momentum", [None, 0.1])
    def test_the_counter_is_the_weight_only_where_momentum_is_none(self, momentum):
        norm = bn.BatchNorm1d(3, momentum=momentum).double()
        norm.num_batches_tracked.fill_(1000)
        bn.recalibrate(norm, clusters())
        assert norm.num_batches_tracked == (10 if momentum is None else 1000)

    def test_masks(self):
        x = torch.randn(6, 3, 5, dtype=torch.float64)
        mask = torch.rand(6, 5) > 0.4
        mask[0] = False  # a batch without any value
        items = [
            {"input": x[i : i + 1].where(mask[i : i + 1, None], torch.nan), "mask": mask[i : i + 1]} for i in range(6)
        ]
        for method in METHODS:
            norm = bn.recalibrate(bn.BatchNorm1d(3).double(), items, method=method)
            close(norm, x.movedim(1, -1)[mask])

    def test_items(self):
        batches = clusters()
        pair = namedtuple("pair", "x label")
        wanted = bn.recalibrate(network(), batches).state_dict()
        for items in (
            [(batch, 1) for batch in batches],
            [[batch] for batch in batches],
            [pair(batch, None) for batch in batches],
            [{"input": batch} for batch in batches],
            [({"input": batch}, 3) for batch in batches],
            [UserDict(input=batch) for batch in batches],
            torch.utils.data.DataLoader(torch.cat(batches), batch_size=8),
        ):
            torch.testing.assert_close(bn.recalibrate(network(), items).state_dict(), wanted, rtol=0, atol=0)
        items = [{"a": {"b": batch}} for batch in batches]
        found = bn.recalibrate(network(), items, forward=lambda model, item: model(item["a"]["b"]))
        torch.testing.assert_close(found.state_dict(), wanted, rtol=0, atol=0)

    def test_nan_follows_the_layers_policy(self):
        batches = [*clusters(), torch.full((8, 3), torch.nan, dtype=torch.float64)]
        norm = bn.recalibrate(bn.BatchNorm1d(3).double(), batches)
        close(norm, torch.cat(batches[:-1]))
        assert norm.num_nonfinite_batches == 1
        assert bn.recalibrate(bn.BatchNorm1d(3, on_nonfinite="propagate").double(), batches).running_mean.isnan().all()
        for layer in (bn.BatchNorm1d(3, on_nonfinite="error"), nn.BatchNorm1d(3)):
            with pytest.raises(InputError, match="finite"):
                bn.recalibrate(layer.double(), batches)


class TestNetworks:
    @pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d], ids=["torch", "ours"])
    def test_joint_is_training(self, kind):
        """Each layer's input in a training forward, pooled; dropout and the like are off."""
        model, batches = network(kind), clusters()
        model.insert(3, nn.Dropout(0.5))
        training = copy.deepcopy(model).train()
        training[3].eval()
        seen = {i: [] for i, module in enumerate(model) if isinstance(module, kind)}
        for batch in batches:
            x = batch
            for i, module in enumerate(training):
                if i in seen:
                    seen[i].append(x)
                x = module(x)
        bn.recalibrate(model.train(), batches)
        for i, values in seen.items():
            close(model[i], torch.cat(values))

    @pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d], ids=["torch", "ours"])
    def test_layerwise_is_inference_layer_by_layer(self, kind):
        model, batches = network(kind), clusters()
        x = torch.cat(batches)
        steps = list(recalibrating(model, batches, method="layerwise"))
        assert steps[-1] == Progress(3, 10, 3, 3)
        assert len([step for step in steps if step.batches == 10]) == 6  # after the last batch, and after the pass
        for module in model.eval():
            if isinstance(module, kind):
                close(module, x)
                y = (x - module.running_mean) / (module.running_var + module.eps).sqrt() * module.weight + module.bias
                torch.testing.assert_close(module(x), y)
            x = module(x)

    def test_the_two_differ(self):
        joint, layerwise = (bn.recalibrate(network(), clusters(), method=method) for method in METHODS)
        torch.testing.assert_close(joint[1].running_var, layerwise[1].running_var)
        assert (joint[7].running_var / layerwise[7].running_var - 1).abs().max() > 0.1

    def test_passes_are_the_depth_not_the_number_of_layers(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.left, self.right, self.top = (bn.BatchNorm1d(3) for _ in range(3))

            def forward(self, x):
                y = torch.zeros_like(x)
                y[:, :] = self.left(x).detach()  # in place, and behind detach
                return self.top(y + self.right(2 * x + 1))

        model = Branches().double()
        batches = clusters()
        assert list(recalibrating(model, batches, method="layerwise"))[-1] == Progress(2, 10, 3, 3)
        model.eval()
        x = torch.cat(batches)
        close(model.right, 2 * x + 1)
        close(model.top, model.left(x) + model.right(2 * x + 1))

    @pytest.mark.parametrize("method", METHODS)
    def test_a_layer_used_several_times_pools_its_calls(self, method):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = self.again = bn.BatchNorm1d(3)

            def forward(self, x):
                return self.norm(x), self.again(x * 3 + 2)

        model, batches = Twice().double(), clusters()
        bn.recalibrate(model, batches, method=method)
        close(model.norm, torch.cat([torch.cat(batches), torch.cat(batches) * 3 + 2]))

    def test_a_layer_that_feeds_itself(self):
        class Loop(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.top = bn.BatchNorm1d(3), bn.BatchNorm1d(3)

            def forward(self, x):
                return self.top(self.norm(2 * self.norm(x) + 1))

        model, batches = Loop().double(), clusters()
        fed = [torch.cat([x, 2 * bn.functional.normalize(x)[0] + 1]) for x in batches]
        bn.recalibrate(model, batches, method="layerwise")
        close(model.norm, torch.cat(fed))
        x = torch.cat(batches)
        norm = model.norm.eval()
        close(model.top, norm(2 * norm(x) + 1))

    @pytest.mark.parametrize("method", METHODS)
    def test_frozen_and_uncalled_layers_and_those_without_statistics_are_left(self, method):
        model = network()
        bn.freeze(model[1])
        model.append(bn.BatchNorm1d(6, track_running_stats=False).double())
        model.train()
        model[4].eval()  # frozen the way torch's users do it
        model.register_module("unused", nn.BatchNorm1d(3).double())
        model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        bn.recalibrate(model, clusters(), method=method)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {"7.running_mean", "7.running_var"}

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("training", [True, False])
    def test_modes_and_hooks_are_put_back(self, method, training):
        model = network().train(training)
        model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        before = state(model)
        bn.recalibrate(model, clusters(), method=method)
        assert state(model)[1:] == before[1:]
        close(model[1], 2 * model[0](torch.cat(clusters())).detach())  # what the layer sees behind the hook

    def test_compiled_models(self):
        model = network(bn.BatchNorm1d)
        batches = clusters()
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
        compiled(batches[0])  # compiled before there are hooks
        bn.recalibrate(compiled, batches, method="layerwise")
        bn.recalibrate(model, batches, method="layerwise")
        for (name, found), wanted in zip(compiled.named_buffers(), model.buffers(), strict=True):
            assert "num_batches" in name or torch.equal(found, wanted), name
        assert compiled(batches[0]).isfinite().all()

    def test_convolutions_channels_last_and_residuals(self):
        torch.manual_seed(0)
        layer = bn.BatchNorm2d(4, activation="relu")
        model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        batches = [torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last) for _ in range(3)]
        bn.recalibrate(model, batches, method="layerwise")
        model.eval()
        close(model[1], model[:1](torch.cat(batches)), 1e-5)
        close(model[3], model[:3](torch.cat(batches)), 1e-5)


class Failing:
    """A loader that raises after some batches, in the second reading if there is one."""

    def __init__(self, error, reading):
        self.error, self.reading = error, reading

    def __iter__(self):
        self.reading -= 1
        for i, batch in enumerate(clusters()):
            if i == 5 and self.reading == 0:
                raise self.error
            yield batch


class TestFailures:
    @pytest.mark.parametrize("kind", [nn.BatchNorm1d, bn.BatchNorm1d], ids=["torch", "ours"])
    @pytest.mark.parametrize(("method", "reading"), [("joint", 1), ("layerwise", 1), ("layerwise", 3)])
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("disk"), SystemExit()], ids=repr)
    def test_a_failing_loader_leaves_the_model_as_it_was(self, kind, method, reading, error):
        model = network(kind)
        model(clusters()[0])
        model[4].running_var[0] = torch.nan
        before = state(model)
        with pytest.raises(type(error)):
            bn.recalibrate(model, Failing(error, reading), method=method)
        same(before, state(model))

    def test_the_check_can_fail(self):
        model = network()
        before = state(model)
        model[1].running_mean += 1e-9
        with pytest.raises(AssertionError):
            same(before, state(model))

    @pytest.mark.parametrize("method", METHODS)
    def test_a_failing_model_and_one_value_in_all(self, method):
        model = network()
        before = state(model)
        with pytest.raises(RuntimeError):
            bn.recalibrate(model, [*clusters(), torch.randn(2, 9).double()], method=method)
        with pytest.raises(InputError, match=r"^1: .*two values per channel"):
            bn.recalibrate(model, [torch.randn(1, 3).double()], method=method)
        with pytest.raises(InputError, match="at least one batch"):
            bn.recalibrate(model, [], method=method)
        same(before, state(model))

    def test_closed_early(self):
        model = network()
        before = state(model)
        steps = recalibrating(model, clusters(), method="layerwise")
        while next(steps).number < 3:
            pass
        steps.close()
        same(before, state(model))

    def test_closed_at_the_end(self):
        """After the last progress everything is in place: modes, hooks, and the new statistics."""
        model, wanted = network(), bn.recalibrate(network(), clusters())
        for progress in (steps := recalibrating(model, clusters())):
            if progress.final == progress.layers:
                assert state(model)[1:] == state(network())[1:]
                steps.close()
        torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=0, atol=0)

    def test_bad_arguments(self):
        model, batches = network(), clusters()
        before = state(model)
        for arguments, error, words in [
            (("model", batches), ArgumentError, "torch.nn.Module"),
            ((model, 3), ArgumentError, "yield batches"),
            ((model, batches[0]), ArgumentError, "yield batches"),
            ((model, [object()]), ArgumentError, "forward="),
            ((model, [(1, batches[0])]), ArgumentError, "tuple of int"),
        ]:
            with pytest.raises(error, match=words):
                bn.recalibrate(*arguments)
        for options, error, words in [
            ({"method": "both"}, InputError, "'joint', 'layerwise'"),
            ({"limit": 0}, InputError, "at least 1"),
            ({"limit": True}, InputError, "at least 1"),
        ]:
            with pytest.raises(error, match=words):
                bn.recalibrate(model, batches, **options)
        with pytest.raises(ArgumentError, match=r"list_iterator.* only once"):
            bn.recalibrate(model, iter(batches), method="layerwise")
        with pytest.raises(StateError, match="lazy"):
            bn.recalibrate(nn.Sequential(bn.LazyBatchNorm1d()), batches)
        same(before, state(model))

    def test_a_model_without_batch_norms(self, caplog):
        bn.recalibrate(nn.Linear(3, 3), clusters())
        assert "no batch norm" in caplog.text


class TestLineage:
    def test_marks_follow_views_writes_and_detours(self):
        lineage = Lineage()
        x, clean = torch.randn(4, 3), torch.randn(4, 3)
        lineage.mark(x, 2)
        with lineage:
            y = (x.detach().relu() + 1).t()[0]
            target = torch.zeros(4, 3)
            target[1].copy_(x[0])
            table = torch.empty(4, 3)
            torch.add(clean, x, out=table)
            other = clean * 2
        assert [lineage.of(value) for value in (y, target, table, [clean, {"x": x}])] == [2, 2, 2, 2]
        assert lineage.of((clean, other)) == 0
        lineage.clear()
        assert lineage.of(x) == 0

    def test_a_freed_tensor_is_not_taken_for_another(self):
        lineage = Lineage()
        with lineage:
            for _ in range(50):
                value = torch.randn(1000)
                assert lineage.of(value) == 0
                lineage.mark(value, 1)
                del value


@pytest.mark.parametrize("method", METHODS)
def test_windows_of_moving_averages_stay_those_of_the_training(method):
    layer = bn.BatchNorm1d(3, statistics=MovingAverage(2, warmup=0), dtype=torch.float64)
    for batch in clusters(4):
        layer(batch)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers() if "window" in name or "gradient" in name}
    data = clusters(7)
    bn.recalibrate(layer, data, method=method)
    assert len(before) == 4
    for name, buffer in before.items():
        assert torch.equal(layer.get_buffer(name), buffer), name
    close(layer, torch.cat(data))
