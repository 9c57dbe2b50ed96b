"""Does the noise of batch statistics regularize, and is dropout needed too?

The network memorizes all of its few training images, so differences on test images show regularization.
"""

from statistics import fmean

import torch
from torch import nn

from batchnorm.lab.data import Dataset, digits
from batchnorm.lab.experiment import AVX512, Experiment, Measured, Metric, Results, Setting, Verdict
from batchnorm.lab.networks import Normalization, perceptron
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


def judge(results: Results) -> Verdict:
    share = {arm: results.mean(arm, "accuracy") for arm in ARMS}
    evidence = (
        f"Test accuracy after {IMAGES} training images: {share['plain']:.1%} without BN, {share['dropout']:.1%} with dropout, "
        f"{share['batch_norm']:.1%} with BN over 64 images, {share['groups_16']:.1%} over 16, {share['groups_4']:.1%} over 4, "
        f"{share['both']:.1%} with BN and dropout."
    )
    spared = share["batch_norm"] >= share["dropout"] and share["both"] <= share["batch_norm"] + MATTERS
    noise = max(share["groups_16"], share["groups_4"]) > share["batch_norm"] + MATTERS
    if spared and noise:
        return Verdict("holds", evidence)
    if spared or noise:
        part = (
            "Dropout is not needed, but smaller batches gain nothing"
            if spared
            else "Smaller batches gain, but so does dropout"
        )
        return Verdict("holds only when", f"{part}. {evidence}")
    return Verdict("does not hold", evidence)


EXPERIMENT = Experiment(
    name="regularization",
    question="Does the noise of batch statistics regularize, so that dropout is not needed?",
    claims={
        (
            "With batch normalization, dropout is not needed, and smaller normalization batches, which are "
            "noisier, generalize better."
        ): judge
    },
    source="Ioffe & Szegedy 2015, sections 3.4 and 4.2.1 (arXiv:1502.03167); Luo et al. 2019 (arXiv:1809.00846)",
    paper="BN-Inception without dropout overfits no more than Inception with it (section 4.2.1), without numbers",
    arms=ARMS,
    metrics={"accuracy": Metric("test accuracy", ".1%"), "training": Metric("training accuracy", ".1%", "neither")},
    measure=measure,
    protocol=(
        f"784-512-256-10 with ReLU on {IMAGES} digits of 28x28 pixels, three draws of them for each seed (quick: 2, full: 10); SGD with "
        f"momentum 0.9 and a cosine schedule, 200 steps of 64 images, learning rates {', '.join(map(str, RATES))} chosen on validation "
        "(quick: 0.05); accuracy of test images. Dropout is 0.5 after each ReLU; smaller normalization batches are groups of the batch of "
        "64 (`Ghost`)."
    ),
    seconds=51,
    timed_on=AVX512,
)
