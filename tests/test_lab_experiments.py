"""The lab's experiments about mechanisms, made small: the direction of each effect, with one seed and margins checked over twenty."""

import math

import pytest
import torch

import batchnorm as bn
from batchnorm.lab.data import digits
from batchnorm.lab.experiment import Measured, Results, Setting
from batchnorm.lab.experiments import (
    alternatives,
    batch_size,
    corruption,
    cost,
    demo,
    depth,
    federated,
    image_classification,
    lr_range,
    paper_4_1,
    population,
    regularization,
    smoothness,
)
from batchnorm.lab.train import Schedule

QUICK = Setting(seed=0, size="quick")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_lr_range_trains_at_rates_and_from_weights_that_plain_does_not(monkeypatch):
    monkeypatch.setattr(demo, "RATES", (0.1, 3.0))
    monkeypatch.setattr(lr_range, "DEVIATIONS", (0.2,))
    monkeypatch.setattr(demo, "schedule", lambda rate, setting: Schedule(rate, 100, 64, setting.seed))
    plain, normalized = (lr_range.measure(arm, QUICK).values for arm in ("plain", "batch_norm"))
    assert normalized["rates"] == 2
    assert plain["rates"] <= 1
    assert normalized["steps"] * 2 < plain["steps"]
    assert (plain["deviations"], normalized["deviations"]) == (0, 1)


def test_the_papers_network_is_many_times_faster():
    data = digits.load()
    normalized = paper_4_1._run("batch_norm", data, 0.1, 250, seed=0)
    plain = paper_4_1._run("plain", data, 0.1, 1000, seed=0)
    assert paper_4_1._reached(normalized, "validation") <= 200
    assert paper_4_1._reached(plain, "validation") == math.inf


def test_thirty_layers_of_sigmoids_learn_only_with_batch_normalization():
    data = digits.load(size=8)
    shares, gradients = {}, {}
    for arm in ("plain", "batch_norm"):
        network = depth._network(arm, 30, torch.nn.Sigmoid, QUICK)
        gradients[arm] = depth._first_gradients(network, data, seed=0)[0]
        shares[arm] = depth._trained(network, data, 0.1, 100, QUICK)[1]
    assert shares["plain"] < 0.2
    assert shares["batch_norm"] > 0.5
    assert 1e-27 < gradients["plain"] < 1e-25 < 1e-2 < gradients["batch_norm"]  # 0 if squared in float32


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "alexnet" else pytest.mark.slow) for name in image_classification.NETWORKS],
)
def test_image_networks_learn_sooner(name):
    data = digits.load(size=16)
    plain, normalized = (
        image_classification._trained(arm, name, 0.03, data, QUICK)[1] for arm in ("plain", "batch_norm")
    )
    assert normalized > 0.93
    assert plain < normalized - 0.04


class TestBatchSize:
    @pytest.mark.slow
    def test_groups_of_two_cost_and_moving_averages_bring_it_back(self):
        large, small, remedied = (
            batch_size.errors(arm, "noise", size, seed=0, epochs=4)[1]
            for arm, size in (("plain", 64), ("plain", 2), ("moving_average", 2))
        )
        assert small > large + 0.04
        assert (small - remedied) / (small - large) > 0.5

    def test_sorted_groups_cost_and_renormalization_brings_it_back(self):
        small, remedied, frozen = (
            batch_size.errors(arm, "sorted", 4, seed=0, epochs=4)[1] for arm in ("plain", "renorm", "frozen")
        )
        assert small > 0.1
        assert remedied < small / 2
        assert frozen < small

    def test_what_is_recovered_is_of_the_part_that_validation_chose(self):
        def seed(test, validation):
            large = {"noise_64": 0.1, "noise_64_validation": 0.1}
            return [Measured({"noise_2": test, "noise_2_validation": validation} | large)]

        others = {arm: seed(0.3, 0.3) for arm in batch_size.LAYERS}
        by_arm = others | {"renorm": seed(0.15, 0.12), "frozen": seed(0.11, 0.2), "group_norm": seed(0.1, 0.1)}
        assert batch_size.recovered(Results(by_arm), "noise") == ("renorm", [pytest.approx(0.75)])


class TestAlternatives:
    @pytest.mark.parametrize("arm", [arm for arm in alternatives.NETWORKS if arm != "batch"])
    def test_each_sample_alone_is_normalized_as_in_a_batch_so_both_normalization_batches_are_one_training(self, arm):
        torch.manual_seed(0)
        network, x = alternatives.NETWORKS[arm]().double(), torch.randn(4, 1, 8, 8, dtype=torch.float64)
        for parameter in network.parameters():  # the blocks of `none` begin as their shortcuts
            parameter.data.uniform_(-0.5, 0.5)
        torch.testing.assert_close(network(x)[:2], network(x[:2]), rtol=1e-9, atol=1e-9)

    def test_networks_begin_with_the_same_convolutions(self):
        def first(arm):
            torch.manual_seed(0)
            return torch.cat([each.weight.flatten() for each in alternatives.NETWORKS[arm]().modules()
                              if isinstance(each, torch.nn.Conv2d)])  # fmt: skip

        wanted = first("batch")
        for arm in alternatives.NETWORKS:
            assert torch.equal(first(arm), wanted) == (arm != "none")

    @pytest.mark.slow
    def test_group_norm_learns_and_dynamic_tanh_does_not_in_place_of_batch_norm(self):
        data = alternatives.noisy(digits.load(size=8))
        found = {
            arm: alternatives.trained(alternatives.NETWORKS[arm], 0.05, data, QUICK)[1]
            for arm in ("batch", "group", "tanh")
        }
        assert min(found["batch"], found["group"]) > 0.8
        assert found["tanh"] < 0.5


@pytest.mark.slow
def test_early_population_statistics_are_far_better_than_running_ones():
    running, counted = (population.measure(arm, QUICK).values["early"] for arm in ("running", "population"))
    assert counted > 0.85
    assert running < counted - 0.05


@pytest.mark.slow
def test_noise_after_batch_normalization_keeps_its_benefit(monkeypatch):
    monkeypatch.setattr(smoothness, "RATES", (0.1,))
    measured = {arm: smoothness.measure(arm, QUICK).values for arm in smoothness.ARMS}
    assert measured["plain"]["accuracy"] < 0.2
    assert measured["noisy"]["accuracy"] > 0.6
    assert measured["noisy"]["moved"] > 10 * measured["plain"]["moved"] > 0
    assert measured["batch_norm"]["turn"] < measured["plain"]["turn"] / 2
    assert measured["batch_norm"]["usual_turn"] > measured["plain"]["usual_turn"]


@pytest.mark.slow
def test_few_images_are_learned_by_heart_and_better_with_batch_normalization():
    plain, normalized = (regularization.measure(arm, QUICK).values for arm in ("plain", "batch_norm"))
    assert plain["training"] == normalized["training"] == 1
    assert normalized["accuracy"] > plain["accuracy"]


def test_batch_normalization_doubles_what_is_kept_and_save_memory_gives_it_back():
    torch.manual_seed(0)
    images, labels = torch.randn(16, 1, 16, 16), torch.arange(16) % 10
    _, layer, build = cost.NETWORKS["vgg"]
    plain, normalized = (cost._saved(build(norm), images, labels) for norm in (None, layer))
    saving = cost._saved(cost.convert(build(layer), save_memory=True), images, labels)
    assert 1.7 < normalized / plain < 2.1
    assert 0.9 < saving / plain < 1.15


class TestFederated:
    def test_clients_share_no_image_and_have_few_classes(self):
        data = digits.load(size=8)
        clients = federated.by_labels(data.train, data.test, torch.Generator().manual_seed(0))
        assert sum(len(client.train) for client in clients) == len(data.train)
        assert max(len(client.train.labels.unique()) for client in clients) <= 4
        assert all(torch.isin(client.test.labels, client.train.labels).all() for client in clients)

    def test_merged_statistics_serve_the_server_and_batch_norms_of_their_own_the_clients(self):
        server = {arm: federated.trained(arm, "labels", 5, QUICK)[0] for arm in ("parameters", "merged")}
        assert server["merged"] > server["parameters"] + 0.1
        clients = {arm: federated.trained(arm, "features", 5, QUICK)[1] for arm in ("merged", "fedbn")}
        assert clients["fedbn"] > clients["merged"] + 0.1


class TestCorruption:
    def test_statistics_and_tent_adapt_to_mixed_batches_and_the_guard_to_batches_of_one_class(self):
        network, test = corruption.trained(QUICK), digits.load(size=16).test

        def accuracy(corrupt, ordered, **options):
            used = bn.adapt(network, **options) if options else network
            with torch.no_grad():
                return corruption.accuracy(used, corruption.stream(test, corrupt, 1, ordered, 0))

        for corrupt in corruption.CORRUPTIONS.values():
            trained = accuracy(corrupt, False)
            assert accuracy(corrupt, False, method="statistics") > trained + 0.05
            assert accuracy(corrupt, False, method="tent") > trained + 0.05
        clean = accuracy(lambda images, _: images, True)
        assert accuracy(lambda images, _: images, True, method="statistics", guard=False) < clean - 0.3
        assert accuracy(lambda images, _: images, True, method="sar") > clean - 0.02

    def test_batches(self):
        test = digits.load(size=16).test
        mixed = [*corruption.stream(test, corruption.pale, 2, False, 0)]
        ordered = [*corruption.stream(test, corruption.pale, 1, True, 0)]
        assert sum(len(batch) for batch in mixed) == 2 * sum(len(batch) for batch in ordered) == 2 * len(test)
        assert all(len(batch.labels.unique()) == 1 for batch in ordered)
        assert min(len(batch.labels.unique()) for batch in mixed) == 10
