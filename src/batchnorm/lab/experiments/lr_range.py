"""At how many learning rates, and from how many initial scales, does the tutorial's network train?

It runs the demonstration's trainings, and the same network with other initial weights. The claim is easy to see: with batch normalization,
the output of a layer does not depend on the scale of its weights, so learning rate and initialization matter less.
"""

from dataclasses import replace

import torch
from torch import nn

from batchnorm.lab.data import Dataset, load
from batchnorm.lab.experiment import AVX2, Curve, Experiment, Measured, Metric, Setting
from batchnorm.lab.experiments import demo
from batchnorm.lab.experiments.demo import COMMON, RATES, TARGET
from batchnorm.lab.networks import tutorial_network
from batchnorm.lab.rules import Rules
from batchnorm.lab.train import accuracy, train

DEVIATIONS = (0.001, 0.003, 0.01, 0.05, 0.2, 1.0, 5.0)  # standard deviations of the initial weights
ENOUGH, FEW = 5, 3  # at how many of seven learning rates it must train with BN, and may train without


def measure(arm: str, setting: Setting) -> Measured:
    setting = replace(setting, size="default")
    data = load(setting.data).to(setting.device)
    shown = demo.measure(arm, setting)
    begun = [(deviation, *_begun(arm, data, deviation, setting)) for deviation in DEVIATIONS]
    deviations = sum(validation >= TARGET for _, validation, _ in begun)
    return Measured(
        values={name: shown.values[name] for name in ("rates", "steps", "accuracy", "best_rate")}
        | {"deviations": deviations},
        curves={
            "sweep": shown.curves["sweep"],
            "begun": [(deviation, test) for deviation, _, test in begun],
        },
    )


def _begun(arm: str, data: Dataset, deviation: float, setting: Setting) -> tuple[float, float]:
    """Accuracy on validation and test images, with initial weights of this standard deviation, at the common learning rate."""
    torch.manual_seed(setting.seed)
    network = tutorial_network(batch_norm=arm == "batch_norm")
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, deviation)
            nn.init.zeros_(layer.bias)
    network.to(setting.device)
    for _ in train(network, data.train, demo.schedule(COMMON, setting)):
        pass
    return accuracy(network, data.validation), accuracy(network, data.test)


METRICS = {
    "rates": Metric(f"learning rates of {len(RATES)} that train", ".3g"),
    "deviations": Metric(f"initial scales of {len(DEVIATIONS)} that train", ".3g"),
    "steps": Metric(f"steps to {TARGET:.0%} at {COMMON:g}", ".0f", "lower"),
    "accuracy": Metric("test accuracy, best rate", ".1%"),
    "best_rate": Metric("best rate (on validation)", ".3g", "neither", each=True),
}
RULES = Rules(demo.ARMS, METRICS)


def _at_many(rates: float) -> bool:
    return rates >= ENOUGH


def _at_few(rates: float) -> bool:
    return rates <= FEW


EXPERIMENT = Experiment(
    name="lr-range",
    question="Does batch normalization let the same network train over a wider range of learning rates and initial weights?",
    claims={
        (
            f"With BN the network trains at {ENOUGH} or more of {len(RATES)} learning rates of three orders of magnitude, without at "
            f"{FEW} at most."
        ): RULES.every("rates", batch_norm=_at_many, plain=_at_few),
        f"At learning rate {COMMON:g} it trains from more of {len(DEVIATIONS)} scales of the initial weights with BN.": RULES.better(
            "deviations", "batch_norm", "plain"
        ),
    },
    source="Ioffe & Szegedy 2015, section 3.3 (arXiv:1502.03167); Bjorck et al. 2018 (arXiv:1806.02375)",
    paper="Inception trains at 5 and 30 times the learning rate with BN, and diverges at 5 times without (section 4.2.2)",
    arms=demo.ARMS,
    metrics=METRICS,
    measure=measure,
    curves={
        "sweep": Curve(
            "Test accuracy by learning rate",
            "learning rate",
            "test accuracy",
            "Compare how wide the plateau of each line is: at these learning rates the network trains.",
            log_x=True,
        ),
        "begun": Curve(
            "Test accuracy by initial scale",
            "deviation of initial weights",
            "test accuracy",
            f"Compare how wide the plateau of each line is: from these initial weights the network trains, at learning rate {COMMON:g}.",
            log_x=True,
        ),
    },
    protocol=(
        "784-512-256-10 with ReLU on digits of 28x28 pixels (or MNIST's files), plain SGD, 240 steps (MNIST: 1000) of 64 images; "
        f"learning rates {', '.join(map('{:g}'.format, RATES))} with PyTorch's initialization, and at {COMMON:g} "
        f"weights from N(0, s²) for s of {', '.join(map('{:g}'.format, DEVIATIONS))}. A training counts as one that trains if it "
        f"ends at {TARGET:.0%} on validation; the best learning rate is chosen there; accuracies are of test images. Both arms of "
        "a seed start from the same weights and see the same batches."
    ),
    seconds=37,
    revised=(
        "One claim was judged, with half of it for a narrower range; the initial weights were in the question and in the "
        "evidence, but without a judge."
    ),
    timed_on=AVX2,
    data="MNIST's IDX files",
)
