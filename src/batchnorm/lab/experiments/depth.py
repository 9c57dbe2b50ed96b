"""How deep a plain stack of sigmoid layers can be and still learn, and how much of the gradient reaches its first layer.

Also a disadvantage: in deep stacks of ReLU with He's initialization, batch normalization makes gradients explode.
"""

import math

import torch
from torch import nn

from batchnorm.lab.data import Dataset, digits
from batchnorm.lab.experiment import AVX2, Curve, Experiment, Measured, Metric, Results, Setting, Verdict
from batchnorm.lab.networks import perceptron
from batchnorm.lab.train import Schedule, accuracy, gradient_norms, train
from batchnorm.layers import BatchNorm1d

DEPTHS = (20, 30, 50)
RATES = (0.01, 0.1)
WIDTH = 64
CHANCE, HALF, ENOUGH = 0.15, 0.5, 0.85


def measure(arm: str, setting: Setting) -> Measured:
    data = digits.load(size=8).to(setting.device)
    steps = setting.pick(180, 180, 900)
    depths = setting.pick((30,), DEPTHS)
    values = {f"accuracy_{depth}": math.nan for depth in DEPTHS}
    accuracies = list[tuple[float, float]]()
    for depth in depths:
        tried = [_trained(_network(arm, depth, nn.Sigmoid, setting), data, rate, steps, setting) for rate in RATES]
        values[f"accuracy_{depth}"] = max(tried)[1]  # the learning rate with the better validation accuracy
        accuracies.append((depth, values[f"accuracy_{depth}"]))
    sigmoid = _first_gradients(_network(arm, 30, nn.Sigmoid, setting), data, setting.seed)
    rectified = _first_gradients(_network(arm, 50, nn.ReLU, setting), data, setting.seed)
    return Measured(
        values | {"gradient": sigmoid[0], "gradient_relu": rectified[0]},
        {
            "accuracy": accuracies,
            "gradient": list(enumerate(sigmoid, start=1)),
            "gradient_relu": list(enumerate(rectified, start=1)),
        },
    )


def _network(arm: str, depth: int, activation: type[nn.Module], setting: Setting) -> nn.Sequential:
    torch.manual_seed(setting.seed)
    sizes = (64, *[WIDTH] * depth, 10)
    network = perceptron(sizes, BatchNorm1d if arm == "batch_norm" else None, activation)
    if activation is nn.ReLU:
        for layer in network:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    return network.to(setting.device)


def _trained(network: nn.Sequential, data: Dataset, rate: float, steps: int, setting: Setting) -> tuple[float, float]:
    """Accuracy on validation and test images after training."""
    for _ in train(network, data.train, Schedule(rate, steps, 64, setting.seed)):
        pass
    return accuracy(network, data.validation), accuracy(network, data.test)


def _first_gradients(network: nn.Sequential, data: Dataset, seed: int) -> list[float]:
    """The norm of each layer's gradient at initialization, from input to output."""
    next(train(network, data.train, Schedule(0.0, 1, 64, seed)))
    return gradient_norms(network)


def judge(results: Results) -> Verdict:
    plain, normalized = (results.values(arm, "accuracy_30") for arm in ("plain", "batch_norm"))
    evidence = (
        f"30 layers of sigmoids: {results.mean('plain', 'accuracy_30'):.1%} of the test images right without BN, "
        f"{results.mean('batch_norm', 'accuracy_30'):.1%} with it; the first layer's gradient begins at "
        f"{results.mean('plain', 'gradient'):.1g} and {results.mean('batch_norm', 'gradient'):.1g}. In 50 layers of ReLU with He's "
        f"initialization it is the other way round: {results.mean('plain', 'gradient_relu'):.2g} without, "
        f"{results.mean('batch_norm', 'gradient_relu'):.2g} with BN."
    )
    if max(plain) <= CHANCE and min(normalized) >= ENOUGH:
        return Verdict("holds", evidence)
    if max(plain) <= CHANCE and min(normalized) >= HALF:
        return Verdict("holds only when", f"Less than {ENOUGH:.0%} are enough. {evidence}")
    return Verdict("does not hold", evidence)


EXPERIMENT = Experiment(
    name="depth",
    question="Does batch normalization let deep networks of saturating activations learn?",
    claims={
        (
            "Thirty layers of sigmoids learn with batch normalization and stay at chance without, for no "
            "gradient reaches the first."
        ): judge
    },
    source="Ioffe & Szegedy 2015, sections 1 and 4.2.2 (arXiv:1502.03167)",
    paper="Inception with sigmoids: 69.8 % with BN, at chance (0.1 %) without (section 4.2.2)",
    arms={"plain": "without BN", "batch_norm": "with BN"},
    metrics={
        **{f"accuracy_{depth}": Metric(f"test accuracy, {depth} layers", ".1%") for depth in DEPTHS},
        "gradient": Metric("first layer's gradient, 30 sigmoid layers", ".1e", "neither"),
        "gradient_relu": Metric("first layer's gradient, 50 ReLU layers", ".1e", "neither"),
    },
    measure=measure,
    curves={
        "accuracy": Curve(
            "Test accuracy by depth, sigmoids",
            "layers",
            "test accuracy",
            "One answer in ten is right by chance (dotted).",
            level=0.1,
        ),
        "gradient": Curve(
            "Gradient at the start, 30 layers of sigmoids",
            "layer",
            "gradient norm",
            "The gradient travels from right to left, from the output to the first layer. Where a line falls toward the left, the gradient "
            "shrinks on its way.",
            log_y=True,
        ),
        "gradient_relu": Curve(
            "Gradient at the start, 50 layers of ReLU",
            "layer",
            "gradient norm",
            "The gradient travels from right to left. Where a line rises toward the left, the gradient grows on its way.",
            log_y=True,
        ),
    },
    protocol=(
        f"Layers of {WIDTH} sigmoids on digits of 8x8 pixels, PyTorch's initialization, plain SGD, 180 steps of 64 images (full: 900); "
        f"the learning rate is the one of {', '.join(map(str, RATES))} with the better validation accuracy; accuracies are of test "
        "images. Gradients are norms over each layer's weights in the first batch. Quick: 30 layers alone."
    ),
    seconds=28,
    timed_on=AVX2,
)
