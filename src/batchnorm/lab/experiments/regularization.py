"""Does the noise of batch statistics regularize, and is dropout needed too?

The network memorizes all of its few training images, so differences on test images show regularization.
"""

from statistics import fmean

import torch
from torch import nn

from batchnorm.lab.data import Dataset, digits
from batchnorm.lab.experiment import AVX2, Experiment, Measured, Metric, Setting
from batchnorm.lab.networks import Normalization, perceptron
from batchnorm.lab.rules import Rules
from batchnorm.lab.train import Schedule, accuracy, train
from batchnorm.layers import BatchNorm1d
from batchnorm.statistics import Ghost

IMAGES = 300
RATES = (0.02, 0.05, 0.2)
MATTERS = 0.005  # smallest relevant difference: about twice the standard error of three seeds with three draws


def _ghost(size: int) -> Normalization:
    return lambda channels: BatchNorm1d(channels, statistics=Ghost(size))


NORMALIZATIONS: dict[str, Normalization | None] = {
    "plain": None,
    "dropout": None,
    "batch_norm": BatchNorm1d,
    "groups_16": _ghost(16),
    "groups_4": _ghost(4),
    "both": BatchNorm1d,
}
ARMS = {
    "plain": "without BN",
    "dropout": "dropout alone",
    "batch_norm": "BN over 64",
    "groups_16": "BN over 16",
    "groups_4": "BN over 4",
    "both": "BN over 64, and dropout",
}


def measure(arm: str, setting: Setting) -> Measured:
    data, draws = digits.load().to(setting.device), setting.pick(2, 3, 10)
    tests = [_best(arm, data, draws * setting.seed + draw, setting) for draw in range(draws)]
    return Measured({"accuracy": fmean(test for test, _ in tests), "training": fmean(learned for _, learned in tests)})


def _best(arm: str, data: Dataset, seed: int, setting: Setting) -> tuple[float, float]:
    """Test and training accuracy of the training with the best validation accuracy."""
    drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    images, tried = data.train[drawn], list[tuple[float, float, float]]()
    for rate in setting.pick(RATES[1:2], RATES):
        torch.manual_seed(seed)
        network = _network(arm).to(setting.device)
        for _ in train(network, images, Schedule(rate, 200, 64, seed, momentum=0.9, cosine=True)):
            pass
        tried.append((accuracy(network, data.validation), accuracy(network, data.test), accuracy(network, images)))
    _, test, learned = max(tried)
    return test, learned


def _network(arm: str) -> nn.Sequential:
    network = perceptron((784, 512, 256, 10), NORMALIZATIONS[arm])
    if arm not in ("dropout", "both"):
        return network
    layers: list[nn.Module] = []
    for layer in network:
        layers += [layer, nn.Dropout(0.5)] if isinstance(layer, nn.ReLU) else [layer]
    return nn.Sequential(*layers)


METRICS = {"accuracy": Metric("test accuracy", ".1%"), "training": Metric("training accuracy", ".1%", "neither")}
RULES = Rules(ARMS, METRICS)


EXPERIMENT = Experiment(
    name="regularization",
    question="Does the noise of batch statistics regularize, so that dropout is not needed?",
    claims={
        "BN over the whole batch alone generalizes better than dropout alone.": RULES.better(
            "accuracy", "batch_norm", "dropout"
        ),
        f"Dropout is not needed beside BN: with both, accuracy is at most {MATTERS:.1%} higher.": RULES.as_good(
            "accuracy", "batch_norm", "both", within=MATTERS
        ),
        f"The noise of smaller normalization batches regularizes: BN over 16 images gains at least {MATTERS:.1%} against 64.": (
            RULES.better("accuracy", "groups_16", "batch_norm", by=MATTERS)
        ),
        f"The noise of the smallest regularizes: BN over 4 images gains at least {MATTERS:.1%} against 64.": RULES.better(
            "accuracy", "groups_4", "batch_norm", by=MATTERS
        ),
    },
    source="Ioffe & Szegedy 2015, sections 3.4 and 4.2.1 (arXiv:1502.03167); Luo et al. 2019 (arXiv:1809.00846)",
    paper="BN-Inception without dropout overfits no more than Inception with it (section 4.2.1), without numbers",
    arms=ARMS,
    metrics=METRICS,
    measure=measure,
    protocol=(
        f"784-512-256-10 with ReLU on {IMAGES} digits of 28x28 pixels, three draws of them for each seed (quick: 2, full: 10); SGD with "
        f"momentum 0.9 and a cosine schedule, 200 steps of 64 images, learning rates {', '.join(map(str, RATES))} chosen on validation "
        "(quick: 0.05); accuracy of test images. Dropout is 0.5 after each ReLU; smaller normalization batches are groups of the batch of "
        "64 (`Ghost`)."
    ),
    seconds=74,
    revised=(
        "One claim joined dropout and smaller batches, and counted as held in part, although smaller batches have no effect. It "
        "is now one claim for each effect, and every seed counts instead of means."
    ),
    timed_on=AVX2,
)
