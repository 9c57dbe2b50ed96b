"""Does batch normalization help by a stable distribution of inputs, or by a smoother loss?

Santurkar et al. add noise after each batch norm: at every step, every unit is shifted and scaled at random, so the inputs of the next layer
are less stable than without batch normalization. Besides the accuracy, smoothness is measured as in their paper: how much the loss and its
gradient change along the gradient in the first steps.
"""

import copy
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.data import Dataset, Examples, digits
from batchnorm.lab.experiment import AVX2, Curve, Experiment, Measured, Metric, Results, Setting, Verdict
from batchnorm.lab.networks import Normalization, perceptron
from batchnorm.lab.rules import Rules, verdict
from batchnorm.lab.train import Schedule, accuracy, activation_input, batches, euclidean_norm, train
from batchnorm.layers import BatchNorm1d

DEPTH, SHALLOW, WIDTH = 20, 5, 64
RATES = (0.03, 0.1, 0.3)
WALKS = (0.5, 1.0, 2.0, 4.0)  # learning rates along the gradient
NOISE = 0.25
NEAR, FAR = (
    0.1,
    0.5,
)  # how much less accurate than BN the noisy network may be, and how much more than the plain one it must be


class Noise(nn.Module):
    """Shift and scale each unit at random, differently at each step, equally for the whole batch; in training only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shift, stretch = NOISE * torch.randn(2, x.shape[1], device=x.device)
        return x * (1 + stretch) + shift


NORMALIZATIONS: dict[str, Normalization | None] = {
    "plain": None,
    "batch_norm": BatchNorm1d,
    "noisy": lambda channels: nn.Sequential(BatchNorm1d(channels), Noise()),
}


def measure(arm: str, setting: Setting) -> Measured:
    data, steps = digits.load(size=8).to(setting.device), setting.pick(200, 300, 1500)
    tried = [_trained(arm, rate, data, steps, setting.seed) for rate in setting.pick(RATES[:2], RATES)]
    _, test, course, moved = max(tried, key=lambda one: one[0])
    (he_range, he_turn), (_, usual_turn) = (_roughness(arm, he, data.train, setting.seed) for he in (True, False))
    values = {"accuracy": test, "moved": moved, "loss_range": he_range, "turn": he_turn, "usual_turn": usual_turn}
    return Measured(values, {"course": course})


def _trained(
    arm: str, rate: float, data: Dataset, steps: int, seed: int
) -> tuple[float, float, list[tuple[float, float]], float]:
    """Validation and test accuracy, validation accuracy by step, and how far the mean inputs of the last sigmoids change in 10 steps."""
    torch.manual_seed(seed)
    network = perceptron((64, *[WIDTH] * DEPTH, 10), NORMALIZATIONS[arm], nn.Sigmoid).to(data.train.images.device)
    course, means = list[tuple[float, float]](), list[Tensor]()
    for step, _ in train(network, data.train, Schedule(rate, steps, 64, seed)):
        if step % 10 == 0:
            course.append((step, accuracy(network, data.validation)))
            received = activation_input(network, data.validation)
            means.append(received.mean(0))
    moved = torch.stack(means).diff(dim=0).abs().median()
    return course[-1][1], accuracy(network, data.test), course, float(moved)


def _roughness(arm: str, he: bool, examples: Examples, seed: int) -> tuple[float, float]:
    """
    Smoothness along the gradient in the first 50 steps of a network that learns with and without BN: the range of the loss, and the
    relative change of the gradient; both are means over steps.
    """
    torch.manual_seed(seed)
    network, rate = perceptron((64, *[WIDTH] * SHALLOW, 10), NORMALIZATIONS[arm]), 0.1
    for layer in network:
        if he and isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    network.to(examples.images.device)
    ranges, turns = list[float](), list[float]()
    for step, _ in train(network, examples, Schedule(rate, 50, 64, seed)):
        if step % 5 == 0:
            walked = copy.deepcopy(network).train()
            batch = examples[next(batches(len(examples), 64, seed + step))]
            start = [weight.detach().clone() for weight in walked.parameters()]
            here, gradient = _gradient(walked, batch, seed)
            losses, turned = [here], list[float]()
            for length in WALKS:
                with torch.no_grad():
                    for weight, origin, slope in zip(walked.parameters(), start, gradient, strict=True):
                        weight.copy_(origin - length * rate * slope)
                there, other = _gradient(walked, batch, seed)
                losses.append(there)
                change = euclidean_norm(*(a - b for a, b in zip(other, gradient, strict=True)))
                turned.append(change / euclidean_norm(*gradient))
            ranges.append(max(losses) - min(losses))
            turns.append(max(turned))
    return fmean(ranges), fmean(turns)


def _gradient(network: nn.Module, batch: Examples, seed: int) -> tuple[float, list[Tensor]]:
    """The loss and its gradient; any noise is the same at all points along the gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss = F.cross_entropy(network(batch.images), batch.labels)
    return loss.item(), list(torch.autograd.grad(loss, list(network.parameters())))


ARMS = {"plain": "without BN", "batch_norm": "with BN", "noisy": "with BN, then noise"}
METRICS = {
    "accuracy": Metric("test accuracy", ".1%"),
    "moved": Metric("move of mean inputs in 10 steps", ".2g", "lower"),
    "loss_range": Metric("range of the loss along the gradient, He", ".2g", "lower"),
    "turn": Metric("turn of the gradient, He", ".2g", "lower"),
    "usual_turn": Metric("turn of the gradient, PyTorch's", ".2g", "lower"),
}
RULES = Rules(ARMS, METRICS)


def _benefit_stays(results: Results) -> Verdict:
    """Whether the noisy network is nearly as accurate as with BN and far from the plain one, and its inputs move more than in both."""
    accurate = RULES.beats(results, "accuracy", "noisy", "batch_norm", by=-NEAR)
    far = RULES.beats(results, "accuracy", "noisy", "plain", by=FAR)
    unstable = all(RULES.beats(results, "moved", other, "noisy") for other in ("plain", "batch_norm"))
    evidence = " ".join(RULES.told(results, metric, *ARMS) for metric in ("accuracy", "moved"))
    return verdict(accurate and far and unstable, evidence)


EXPERIMENT = Experiment(
    name="smoothness",
    question="Does batch normalization help by keeping inputs stable, or by making the loss smoother?",
    claims={
        f"With less stable inputs than without BN, {DEPTH} layers of sigmoids keep the benefit of BN.": _benefit_stays,
        f"From He's initialization, the gradient of {SHALLOW} layers of ReLU turns less along its way with BN.": RULES.better(
            "turn", "batch_norm", "plain"
        ),
        f"From PyTorch's initialization, the gradient of {SHALLOW} layers of ReLU turns less along its way with BN.": RULES.better(
            "usual_turn", "batch_norm", "plain"
        ),
    },
    source="Santurkar et al. 2018, sections 2.2 and 3.1 (arXiv:1805.11604)",
    paper="VGG on CIFAR-10: noisy BN trains nearly as BN, with less stable inputs than without (figure 2), as a plot without numbers",
    arms=ARMS,
    metrics=METRICS,
    measure=measure,
    curves={
        "course": Curve(
            f"Validation accuracy, {DEPTH} layers of sigmoids",
            "step",
            "validation accuracy",
            "Compare batch normalization with and without noise after it: the closer these two lines, the less stable inputs matter.",
        )
    },
    protocol=(
        f"{DEPTH} layers of {WIDTH} sigmoids on digits of 8x8 pixels, plain SGD, 300 steps of 64 images (quick: 200, full: 1500), learning "
        f"rate of {', '.join(map(str, RATES))} chosen on validation (quick: the first two), accuracy of test images. Noise: each unit "
        f"times 1 + {NOISE} N(0, 1), plus {NOISE} N(0, 1), drawn anew at each step. Smoothness: {SHALLOW} layers of ReLU, with He's "
        "and with PyTorch's initialization, in the first 50 steps at 0.1; walks of 0.5 to 4 learning rates along the gradient of a "
        "batch; the largest change of the gradient relative to its norm."
    ),
    seconds=35,
    revised=(
        "One claim joined stable inputs and smoothness, and an initialization at which the gradient turns more with BN was a "
        "condition of its verdict. It is now one claim for each effect, and every seed counts instead of means."
    ),
    timed_on=AVX2,
)
