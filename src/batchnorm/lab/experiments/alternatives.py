"""What batch norm can be replaced with, and what the replacement does to accuracy at large and at small normalization batches.

One residual network learns noisy digits with each of the alternatives; most are what `convert(to=...)` makes of it. As in `batch-size`,
the normalization batch is independent of SGD's: batches of 64 pass the convolutions at once, and batch norms in groups of 2. All
alternatives normalize each sample alone, so with them both normalization batches are the same training, which is measured once.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from batchnorm.lab.data import Dataset, digits
from batchnorm.lab.experiment import AVX2, Curve, Experiment, Measured, Metric, Setting
from batchnorm.lab.experiments.batch_size import InGroups
from batchnorm.lab.image_networks import Residual, resnet
from batchnorm.lab.normalizations import DynamicTanh, RootMeanSquareNorm
from batchnorm.lab.rules import Rules
from batchnorm.lab.train import Schedule, accuracy, train
from batchnorm.layers import BatchNorm2d
from batchnorm.surgery import convert
from batchnorm.surgery.alternatives import Affine

BATCH, SMALL = 64, 2
NOISE = 0.5  # deviations of the images
RATES = (0.02, 0.05, 0.1, 0.2)
MATTERS = 0.01  # of accuracy: less is no difference here
Course = list[tuple[float, float]]


def _in_groups(channels: int) -> nn.Module:
    return InGroups(BatchNorm2d(channels, momentum=0.1 * SMALL / BATCH), SMALL)


def careful(network: nn.Module) -> nn.Module:
    """He's initialization, and residual blocks that begin as their shortcut (De & Smith 2020, arXiv:2002.10444, SkipInit)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif isinstance(layer, Residual):
            scale = layer.body[-1]
            assert isinstance(scale, Affine)
            assert scale.weight is not None
            nn.init.zeros_(scale.weight)
    return network


# Each creates the network, always with the same weights of convolutions after the same seed, except for `none`.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: resnet(BatchNorm2d),
    "group": lambda: convert(resnet(BatchNorm2d), to="group"),
    "layer": lambda: convert(resnet(BatchNorm2d), to="layer"),
    "instance": lambda: convert(resnet(BatchNorm2d), to="instance"),
    "standardized": lambda: convert(resnet(BatchNorm2d), to="group", standardize_weights=True),
    "rms": lambda: resnet(RootMeanSquareNorm),
    "tanh": lambda: resnet(DynamicTanh),
    "plain": lambda: convert(resnet(BatchNorm2d), to="none"),
    "none": lambda: careful(convert(resnet(BatchNorm2d), to="none")),
}


def noisy(data: Dataset) -> Dataset:
    """The images with noise that is the same in every run."""
    drawn = torch.Generator().manual_seed(99)
    splits = (
        replace(split, images=split.images + NOISE * torch.randn(split.images.shape, generator=drawn))
        for split in (data.train, data.validation, data.test)
    )
    return Dataset(data.name, *splits)


def trained(create: Callable[[], nn.Module], rate: float, data: Dataset, setting: Setting) -> tuple[Course, float]:
    """Validation accuracy by epoch, and test accuracy at the end."""
    torch.manual_seed(setting.seed)
    network = create().to(setting.device)
    every = len(data.train) // BATCH
    steps = every * setting.pick(4, 10, 30)
    schedule = Schedule(rate, steps, BATCH, setting.seed, momentum=0.9, cosine=True)
    course = [
        (step / every, accuracy(network, data.validation))
        for step, _ in train(network, data.train, schedule)
        if step % every == 0
    ]
    return course or [(0.0, 0.0)], accuracy(network, data.test)


def measure(arm: str, setting: Setting) -> Measured:
    data = noisy(digits.load(size=8)).to(setting.device)
    creates = {BATCH: NETWORKS[arm]} | ({SMALL: lambda: resnet(_in_groups)} if arm == "batch" else {})
    best = {
        size: max((trained(create, rate, data, setting) for rate in setting.pick(RATES[1:2], RATES)), key=_last)
        for size, create in creates.items()
    }
    best.setdefault(SMALL, best[BATCH])
    return Measured(
        {f"accuracy_{size}": test for size, (_, test) in best.items()},
        {f"course_{size}": course for size, (course, _) in best.items()},
    )


def _last(found: tuple[Course, float]) -> float:
    return found[0][-1][1]


ARMS = {
    "batch": "batch norm",
    "group": "group norm",
    "layer": "layer norm",
    "instance": "instance norm",
    "standardized": "group norm, weight standardization",
    "rms": "root mean square",
    "tanh": "dynamic tanh",
    "plain": "none",
    "none": "none, careful initialization",
}
METRICS = {f"accuracy_{size}": Metric(f"test accuracy, normalization batch {size}", ".1%") for size in (BATCH, SMALL)}
RULES = Rules(ARMS, METRICS)
LARGE_BATCH, SMALL_BATCH = METRICS
EXPERIMENT = Experiment(
    name="alternatives",
    question="What can batch norm be replaced with, and at which normalization batch does that pay?",
    kind="remedy",
    claims={
        f"At {BATCH} group norm is as accurate as batch norm, within {MATTERS:.0%}.": RULES.as_good(
            LARGE_BATCH, "group", "batch", within=MATTERS
        ),
        f"At {SMALL} group norm is more accurate than batch norm.": RULES.better(SMALL_BATCH, "group", "batch"),
        "Group norm is more accurate than layer norm.": RULES.better(LARGE_BATCH, "group", "layer"),
        "Group norm is more accurate than instance norm.": RULES.better(LARGE_BATCH, "group", "instance"),
        f"Weight standardization gains at least {MATTERS:.0%} for group norm.": RULES.better(
            LARGE_BATCH, "standardized", "group", by=MATTERS
        ),
        f"Without the mean, by the root mean square, layer norm is as accurate, within {MATTERS:.0%}.": RULES.as_good(
            LARGE_BATCH, "rms", "layer", within=MATTERS
        ),
        f"Dynamic tanh, which normalizes nothing, is as accurate as layer norm, within {MATTERS:.0%}.": RULES.as_good(
            LARGE_BATCH, "tanh", "layer", within=MATTERS
        ),
        f"Careful initialization without normalization is as accurate as batch norm at {BATCH}, within {MATTERS:.0%}.": (
            RULES.as_good(LARGE_BATCH, "none", "batch", within=MATTERS)
        ),
        f"Careful initialization without normalization is more accurate than batch norm at {SMALL}.": RULES.better(
            SMALL_BATCH, "none", "batch"
        ),
        "Without normalization, careful initialization is more accurate than PyTorch's.": RULES.better(
            LARGE_BATCH, "none", "plain"
        ),
    },
    source=(
        "Wu & He 2018 (arXiv:1803.08494); Qiao et al. 2019 (arXiv:1903.10520); Zhang & Sennrich 2019 (arXiv:1910.07467); De & Smith 2020 "
        "(arXiv:2002.10444); Zhu et al. 2025 (arXiv:2503.10622)"
    ),
    paper=(
        "ResNet-50 on ImageNet, error at 32 images a device: BN 23.6 %, GN 24.1 %, LN 25.3 %, IN 28.4 %; at 2: BN 34.7 %, GN 24.1 % "
        "(Wu & He)"
    ),
    arms=ARMS,
    metrics=METRICS,
    measure=measure,
    curves={
        f"course_{size}": Curve(
            f"Validation accuracy, normalization batch {size}",
            "epoch",
            "validation accuracy",
            caption,
        )
        for size, caption in (
            (
                BATCH,
                "Each line is one normalization at its best learning rate. Higher is better, and earlier is faster.",
            ),
            (
                SMALL,
                f"The line of batch norm alone differs from the figure for {BATCH}: the others normalize each sample alone.",
            ),
        )
    },
    protocol=(
        f"A residual network of 15 convolutions with 16 to 64 channels on digits of 8x8 pixels with noise of {NOISE} deviations; SGD with "
        f"batches of {BATCH}, momentum 0.9, learning rates {', '.join(map(str, RATES))} with a cosine schedule, chosen on validation "
        f"(quick: {RATES[1]}), 10 epochs (quick: 4, full: 30). Convolutions begin with PyTorch's initialization; without normalization, "
        "with He's, and the last scale of each residual block with 0. Groups have 8 channels; layer norm and the root mean square take all "
        f"values of a sample. At a normalization batch of {SMALL}, batch norms take each pair of images alone, with the momentum in "
        "proportion."
    ),
    seconds=125,
    revised=(
        "The last claim and its arm, the network without normalization from PyTorch's initialization, were added after a quick run in "
        "which it learned as well as from the careful one. Learning rate 0.2 was added because the best one without normalization was the "
        "largest."
    ),
    timed_on=AVX2,
)
