"""Statistics of models trained apart: merged from state_dicts as if their data were one set, or left with each client."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.errors import ArgumentError, InputError, ShapeError
from batchnorm.statistics import Domains, MovingAverage

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def network():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4), nn.BatchNorm1d(4)
    ).double()


def clients(sizes=(7, 20, 3)):
    """Data of clients that differ in mean and in spread."""
    return [torch.randn(size, 2, 5, 5, dtype=torch.float64) * (1 + i) + 10 * i for i, size in enumerate(sizes)]


class TestMergedEqualsPooled:
    def test_a_layer_in_float64(self):
        data = [x.movedim(1, -1).reshape(-1, 2) for x in clients()]
        states = [
            {"running_mean": x.mean(0), "running_var": x.var(0), "num_batches_tracked": torch.tensor(i)}
            for i, x in enumerate(data)
        ]
        merged = bn.merge_statistics(states, [len(x) for x in data])
        together = torch.cat(data)
        torch.testing.assert_close(merged["running_mean"], together.mean(0), **EXACT)
        torch.testing.assert_close(merged["running_var"], together.var(0), **EXACT)
        assert merged["num_batches_tracked"] == 2
        averaged = torch.stack([state["running_var"] for state in states]).mean(0)
        assert (merged["running_var"] > 4 * averaged).all()  # what an average of variances misses here

    def test_models_that_were_recalibrated_layer_by_layer(self):
        """The first layers see the same network on every client, so theirs are the pooled statistics; counts differ by layer."""
        data, model = clients(), network()
        alone = [bn.recalibrate(copy.deepcopy(model), [x]).state_dict() for x in data]
        merged = bn.merge_statistics(alone, [{"1": 9 * len(x), "5": len(x)} for x in data])
        inputs = [model[0](x).movedim(1, -1).reshape(-1, 3) for x in data]
        torch.testing.assert_close(merged["1.running_mean"], torch.cat(inputs).mean(0), **EXACT)
        torch.testing.assert_close(merged["1.running_var"], torch.cat(inputs).var(0), **EXACT)
        model.load_state_dict(merged, strict=False)
        assert list(merged) == [key for key in model.state_dict() if "running" in key or "tracked" in key]

    def test_by_the_convention(self):
        data = [x.movedim(1, -1).reshape(-1, 2) for x in clients()]
        counts = [len(x) for x in data]
        states = [{"running_mean": x.mean(0), "running_var": x.var(0, correction=0)} for x in data]
        biased = bn.merge_statistics(states, counts, running_variance="biased")
        torch.testing.assert_close(biased["running_var"], torch.cat(data).var(0, correction=0), **EXACT)
        assert (bn.merge_statistics(states, counts)["running_var"] - biased["running_var"]).abs().min() > 1e-4

    def test_of_equal_states_the_biased_one_stays(self):
        state = {"running_mean": torch.tensor([1.0, -3.0]), "running_var": torch.tensor([0.1, 7.0])}
        merged = bn.merge_statistics([state] * 3, [5, 1, 30], running_variance="biased")
        assert all(torch.equal(merged[key], state[key]) for key in state)

    def test_complex_statistics_merge_by_component(self):
        data = [torch.randn(size, 2, dtype=torch.complex128) + size for size in (5, 9)]
        parts = [torch.view_as_real(x) for x in data]
        states = [
            {"running_mean": torch.view_as_complex(x.mean(0)), "running_var": torch.view_as_complex(x.var(0))}
            for x in parts
        ]
        merged = bn.merge_statistics(states, [5, 9])
        torch.testing.assert_close(torch.view_as_real(merged["running_var"]), torch.cat(parts).var(0), **EXACT)

    def test_each_domain_on_its_own(self):
        layers = [
            bn.BatchNorm1d(2, momentum=None, statistics=Domains(("real", "fake")), dtype=torch.float64) for _ in "ab"
        ]
        data = torch.randn(2, 2, 6, 2, dtype=torch.float64) + 5 * torch.arange(4.0).view(2, 2, 1, 1)
        for layer, of_domains in zip(layers, data, strict=True):
            for name, x in zip(("real", "fake"), of_domains, strict=True):
                with bn.domain(name):
                    layer(x)
        merged = bn.merge_statistics([layer.state_dict() for layer in layers], [6, 6])
        for suffix, of_clients in (("", data[:, 0]), ("_fake", data[:, 1])):
            torch.testing.assert_close(merged[f"running_mean{suffix}"], of_clients.flatten(0, 1).mean(0), **EXACT)
            torch.testing.assert_close(merged[f"running_var{suffix}"], of_clients.flatten(0, 1).var(0), **EXACT)


class TestWhatItTakes:
    def state(self, **changes):
        return {"a.running_mean": torch.zeros(2), "a.running_var": torch.ones(2), "a.weight": torch.ones(2)} | changes

    def test_a_model_without_data_is_ignored_even_if_it_is_nan(self):
        empty = self.state() | {
            "a.running_mean": torch.full((2,), torch.nan),
            "a.running_var": torch.full((2,), torch.nan),
        }
        merged = bn.merge_statistics([empty, self.state()], [0, 9])
        assert torch.equal(merged["a.running_var"], torch.ones(2))
        assert list(merged) == ["a.running_mean", "a.running_var"]

    def test_windows_are_left(self, caplog):
        state = bn.BatchNorm1d(2, statistics=MovingAverage(4)).state_dict()
        merged = bn.merge_statistics([state, state], [3, 4])
        assert set(merged) == {"running_mean", "running_var", "num_batches_tracked"}
        assert "left running_mean_window" in caplog.text

    def test_dtype_is_that_of_the_first(self):
        merged = bn.merge_statistics([self.state(), {k: v.double() for k, v in self.state().items()}], [1, 2])
        assert merged["a.running_mean"].dtype == torch.float32

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ([1], "a count for each"),
            ([1, -1], "not negative"),
            ([0, 0], "not all 0"),
            ([1, torch.inf], "finite"),
            ([1, {"b": 2}], "lacks 'a'"),
        ],
    )
    def test_wrong_counts(self, counts, message):
        with pytest.raises(InputError, match=message):
            bn.merge_statistics([self.state()] * 2, counts)

    def test_models_that_do_not_fit(self):
        with pytest.raises(InputError, match=r"lacks a\.running_mean"):
            bn.merge_statistics([self.state(), {}], [1, 1])
        with pytest.raises(ShapeError, match="one shape"):
            bn.merge_statistics([self.state(), self.state() | {"a.running_var": torch.ones(3)}], [1, 1])
        with pytest.raises(ArgumentError, match="pass a list"):
            bn.merge_statistics(self.state(), [1])
        with pytest.raises(InputError, match="unbiased"):
            bn.merge_statistics([self.state()], [1], running_variance="population")


class TestLocalKeys:
    def test_names_come_from_layers_not_from_patterns(self):
        model = network()
        own = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        assert bn.local_keys(model) == tuple(f"{i}.{name}" for i in (1, 5) for name in own)
        assert bn.local_keys(model, affine=False) == tuple(f"{i}.{name}" for i in (1, 5) for name in own[2:])
        assert bn.local_keys(bn.convert(model)) == bn.local_keys(network())

    def test_a_client_keeps_its_batch_norms(self):
        client, server = network(), network()
        client(clients()[0])
        local, before = bn.local_keys(client), copy.deepcopy(client.state_dict())
        client.load_state_dict({k: v for k, v in server.state_dict().items() if k not in local}, strict=False)
        for key, value in client.state_dict().items():
            assert torch.equal(value, before[key] if key in local else server.state_dict()[key])

    def test_shared_layers_submodules_and_parametrizations(self):
        class WithChild(nn.BatchNorm1d):
            def __init__(self, channels):
                super().__init__(channels)
                self.head = nn.Linear(channels, 1)

        shared = bn.BatchNorm1d(2, statistics=Domains(("a", "b")), affine=False)
        odd = parametrize.register_parametrization(nn.BatchNorm1d(2), "weight", nn.Identity())
        model = nn.ModuleDict({"first": shared, "again": shared, "child": WithChild(2), "odd": odd})
        local = bn.local_keys(model)
        assert {"first.running_mean_b", "again.running_mean_b", "odd.parametrizations.weight.original"} < set(local)
        assert {key for key in model.state_dict() if key not in local} == {"child.head.weight", "child.head.bias"}

    def test_the_model_itself(self):
        assert bn.local_keys(nn.BatchNorm1d(2), affine=False) == ("running_mean", "running_var", "num_batches_tracked")
        with pytest.raises(ArgumentError):
            bn.local_keys({})
