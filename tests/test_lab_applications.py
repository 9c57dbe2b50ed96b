"""The lab's applications: the direction of every effect at a reduced size."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import pytest
import torch
from torch import nn

from batchnorm.lab import result
from batchnorm.lab.control import CartPoles, mean_return
from batchnorm.lab.experiment import Setting
from batchnorm.lab.experiments import NAMES, dqn, gan, load, policy_gradient, recommender, translation
from batchnorm.layers import BatchNorm1d, BatchNorm2d

ROOT = Path(__file__).parent.parent
QUICK = Setting(seed=0, size="quick")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measure(name: str, *arms: str) -> list[dict[str, float]]:
    return [dict(load(name).measure(arm, QUICK).values) for arm in arms]


class TestPieces:
    def test_a_fallen_pole_is_set_up_again(self):
        poles = CartPoles(3, seed=0)
        single = gymnasium.make("CartPole-v1").unwrapped
        single.reset(seed=0)
        single.state = poles.states[0].double().numpy()
        steps, fell = 0, torch.zeros(3, dtype=torch.bool)
        while not fell[0]:
            fell = poles.step(torch.ones(3, dtype=torch.int64))
            state, _, ended, _, _ = single.step(1)
            torch.testing.assert_close(poles.states[0], torch.from_numpy(state), atol=1e-5, rtol=1e-4)
            steps += 1
            assert bool(fell[0]) == ended
        assert 8 <= steps <= 11
        assert poles.over[0]
        poles.step(torch.zeros(3, dtype=torch.int64))
        assert not poles.over[0]
        assert poles.states[0].abs().max() <= 0.05

    def test_the_mean_return_is_that_of_whole_episodes(self):
        assert 8 < mean_return(lambda states: torch.ones(len(states), dtype=torch.int64)) < 11
        # Leaning right and falling right: push right.
        assert mean_return(lambda states: (states @ torch.tensor([0.1, 0.2, 1.0, 0.5]) > 0).long()) == 500

    def test_advantages_are_discounted_errors(self):
        generator = torch.Generator().manual_seed(0)
        values, next_values = torch.randn(2, 3, 1, generator=generator)
        over = torch.tensor([[False], [True], [False]])
        error = 0.01 + 0.99 * next_values - values
        wanted = torch.stack([error[0] + 0.99 * 0.95 * error[1], error[1], error[2]])
        torch.testing.assert_close(policy_gradient.advantages(values, next_values, over), wanted)

    def test_the_joint_forward_normalizes_both_by_both(self):
        memory = dqn.Memory(8)
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            state, following = torch.randn(2, 4, generator=generator)
            memory.add(state, torch.tensor([1]), following + 2, torch.tensor(0.0))
        network, losses = dqn.q_network("joint"), {}
        first = network[0]
        assert isinstance(first, BatchNorm1d)
        for arm in ("joint", "separate"):
            first.reset_running_stats()
            losses[arm] = dqn.temporal_difference(arm, network, network, memory, torch.arange(8)).item()
            moments = (memory.states if arm == "separate" else torch.cat([memory.states, memory.next_states])).mean(0)
            if arm == "joint":
                torch.testing.assert_close(first.running_mean, 0.01 * moments)
            assert first.num_batches_tracked == {"joint": 1, "separate": 2}[arm]
        assert losses["joint"] != losses["separate"]

    def test_area_under_the_curve_counts_pairs(self):
        generator = torch.Generator().manual_seed(0)
        scores, positive = (
            torch.randint(5, (60,), generator=generator).float(),
            torch.rand(60, generator=generator) < 0.4,
        )
        pairs = scores[positive][:, None] - scores[~positive][None]
        wanted = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()
        assert recommender.area_under_curve(scores, positive) == pytest.approx(wanted)

    def test_a_translation_is_read_from_its_end(self):
        said, lengths = translation.shifted(torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]]))
        assert said.tolist() == [[0, 5, 6, 0], [0, 7, 0, 0]]
        assert lengths.tolist() == [3, 2]


@dataclass(frozen=True)
class Tiny(Setting):
    """A twentieth of a quick run, to see that it runs."""

    def pick(self, quick, default, full=None):
        return max(12, quick // 20) if isinstance(quick, int) else quick


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("detection", "both"),
        ("speech", "both"),
        pytest.param("gan", "joint", marks=pytest.mark.slow),
        ("dqn", "joint"),
        pytest.param("policy-gradient", "input", marks=pytest.mark.slow),
        ("recommender", "input"),
        ("translation", "batch_norm"),
        ("driving", "both"),
    ],
)
def test_an_arm_measures_every_metric_and_curve(name, arm):
    experiment = load(name)
    measured = experiment.measure(arm, Tiny(seed=0, size="quick"))
    assert measured.values.keys() == experiment.metrics.keys()
    assert not any(math.isnan(value) for value in measured.values.values())
    assert measured.curves.keys() <= experiment.curves.keys()
    assert all(points for points in measured.curves.values())


@pytest.mark.slow
class TestEffects:
    """At the size "quick", one seed; the margins were tried on other seeds, see docs/lab-applications.md."""

    def test_detection(self):
        none, both = measure("detection", "none", "both")
        assert both["precision"] > none["precision"] + 0.1

    def test_speech(self):
        none, both = measure("speech", "none", "both")
        assert none["letters"] > 1.5 * both["letters"]

    def test_gan(self):
        none, both, joint = measure("gan", "tuned", "both", "joint")
        assert none["distance"] > 1.2 * both["distance"]  # 1.26 on plain torch operators, more on the kernels
        assert joint["distance"] > 1.5 * both["distance"]

    def test_dqn(self):
        none, joint = measure("dqn", "none", "joint")
        assert joint["mean_return"] > 1.3 * none["mean_return"]

    def test_policy_gradient(self):
        none, normalized = measure("policy-gradient", "none", "input")
        assert none["last_return"] < 20
        assert normalized["last_return"] > 100

    def test_recommender(self):
        none, normalized, logarithm = measure("recommender", "none", "input", "logarithm")
        assert normalized["area"] > none["area"] + 0.02
        assert logarithm["area"] > normalized["area"] - 0.02  # which does as well: BN stands in for knowledge

    def test_translation(self):
        none, normalized = measure("translation", "none", "batch_norm")
        assert normalized["right"] > none["right"] + 0.1

    def test_driving(self):
        none, both = measure("driving", "none", "both")
        assert none["error"] > 1.3 * both["error"]


def test_the_page_has_the_claims_and_verdicts_of_the_published_results():
    page, results = (
        (ROOT / "docs" / "lab-applications.md").read_text(encoding="utf-8"),
        ROOT / "benchmarks" / "results" / "lab",
    )
    applications = [experiment for experiment in map(load, NAMES) if experiment.kind == "application"]
    judged = [result.load(experiment.name, results).verdicts(experiment) for experiment in applications]
    rows = [f"{claim} | {verdict.answer} |" for verdicts in judged for claim, verdict in verdicts.items()]
    assert re.findall(r"^\| \[`.*?\) \| (.*)$", page, re.MULTILINE) == rows


def trained_gan(arm: str, seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    for step, generator, discriminator in gan.trained(arm, Setting(seed=seed, size="quick"), 0.001):
        if step == 3:
            return generator, discriminator
    raise AssertionError


def test_seeds_differ_and_repeat():
    first, again, other = (trained_gan("none", seed)[0][1].weight.detach() for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_domains_train_as_separate_batches_do_and_remember_each():
    (generator, plain), (same, apart) = trained_gan("both", 0), trained_gan("domains", 0)
    for one, other in zip(generator.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other)
    layers = [[part for part in network if isinstance(part, BatchNorm2d)] for network in (plain, apart)]
    for mixed, separate in zip(*layers, strict=True):
        assert mixed.num_batches_tracked == 9  # real, generated, and generated again, three times
        assert (separate.num_batches_tracked, separate.num_batches_tracked_fake) == (3, 6)
        assert not torch.allclose(separate.running_mean, separate.running_mean_fake)
