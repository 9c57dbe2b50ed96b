"""At how many learning rates, and from how many initial scales, does the tutorial's network train?

It runs the demonstration's trainings, and the same network with other initial weights. The claim is easy to see: with batch normalization,
the output of a layer does not depend on the scale of its weights, so learning rate and initialization matter less.
"""

from dataclasses import replace

import torch
from torch import nn

from batchnorm.lab.data import Dataset, load
from batchnorm.lab.experiment import AVX2, Curve, Experiment, Measured, Metric, Results, Setting, Verdict
from batchnorm.lab.experiments import demo
from batchnorm.lab.experiments.demo import COMMON, RATES, TARGET
from batchnorm.lab.networks import tutorial_network
from batchnorm.lab.train import accuracy, train

DEVIATIONS = (0.001, 0.003, 0.01, 0.05, 0.2, 1.0, 5.0)  # standard deviations of the initial weights
ENOUGH, TOO_MANY = 5, 3  # at how many of seven learning rates it must train with and without


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


def judge(results: Results) -> Verdict:
    plain, normalized = (results.values(arm, "rates") for arm in ("plain", "batch_norm"))
    evidence = (
        f"Of {len(RATES)} learning rates {min(normalized):.0f} train each seed with BN, {max(plain):.0f} at most without; "
        f"of {len(DEVIATIONS)} scales of the initial weights {results.mean('batch_norm', 'deviations'):.1f} and "
        f"{results.mean('plain', 'deviations'):.1f} on average. Test accuracy at the best learning rate: "
        f"{results.mean('batch_norm', 'accuracy'):.1%} and {results.mean('plain', 'accuracy'):.1%}."
    )
    if min(normalized) >= ENOUGH and max(plain) <= TOO_MANY:
        return Verdict("holds", evidence)
    if min(normalized) >= max(plain) + 2:
        return Verdict("holds only when", f"A range less wide counts. {evidence}")
    return Verdict("does not hold", evidence)


EXPERIMENT = Experiment(
    name="lr-range",
    question="Does batch normalization let the same network train over a wider range of learning rates and initial weights?",
    claims={
        "With batch normalization the network trains at most learning rates of three orders of magnitude, without at a few.": judge
    },
    source="Ioffe & Szegedy 2015, section 3.3 (arXiv:1502.03167); Bjorck et al. 2018 (arXiv:1806.02375)",
    paper="Inception trains at 5 and 30 times the learning rate with BN, and diverges at 5 times without (section 4.2.2)",
    arms=demo.ARMS,
    metrics={
        "rates": Metric(f"learning rates of {len(RATES)} that train", ".3g"),
        "deviations": Metric(f"initial scales of {len(DEVIATIONS)} that train", ".3g"),
        "steps": Metric(f"steps to {TARGET:.0%} at {COMMON:g}", ".0f", "lower"),
        "accuracy": Metric("test accuracy, best rate", ".1%"),
        "best_rate": Metric("best rate (on validation)", ".3g", "neither", each=True),
    },
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
    timed_on=AVX2,
    data="MNIST's IDX files",
)
