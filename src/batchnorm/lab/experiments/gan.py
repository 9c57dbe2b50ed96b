"""What does batch normalization do for a generator and a discriminator?

What if the discriminator normalizes real and generated images in one batch? Then the statistics of the batch reveal which images are real.
Separate statistics, `Domains(("real", "fake"))`, avoid this in training, and for a discriminator that is used afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.adversaries import NOISE, in_range, judged_by, networks
from batchnorm.lab.data import Examples
from batchnorm.lab.experiment import AVX2, Curve, Experiment, Measured, Metric, Setting
from batchnorm.lab.frechet import frechet_distance
from batchnorm.lab.rules import Rules
from batchnorm.lab.train import batches
from batchnorm.statistics import Domains, domain

ARMS = {
    "none": "without BN",
    "tuned": "without BN, tuned",
    "both": "BN in both",
    "generator": "BN, generator only",
    "discriminator": "BN, discriminator only",
    "joint": "BN in both, mixed batches",
    "domains": "BN in both, Domains",
}
BATCH = 64
LEARNING_RATE = {
    "none": 0.001,
    "tuned": 0.004,
    "both": 0.001,
    "generator": 0.004,
    "discriminator": 0.001,
    "joint": 0.004,
    "domains": 0.001,
}
RATIO = 3.0  # the smallest ratio of distances without and with BN


def scores_of(discriminator: nn.Module, images: Tensor, name: str, arm: str) -> Tensor:
    """The scores of the discriminator for images that are all "real" or all "fake"."""
    with domain(name) if arm == "domains" else nullcontext():
        return discriminator(images)


def trained(arm: str, setting: Setting, rate: float) -> Iterator[tuple[int, nn.Sequential, nn.Sequential]]:
    """Train, and yield generator and discriminator after each step, from 1."""
    images = in_range(judged_by()[0].train.images)
    torch.manual_seed(setting.seed)
    statistics = Domains(("real", "fake")) if arm == "domains" else None
    generator, discriminator = networks(
        arm not in ("none", "tuned", "discriminator"), arm not in ("none", "tuned", "generator"), statistics
    )
    of_generator = torch.optim.Adam(generator.parameters(), rate, (0.5, 0.999))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), rate, (0.5, 0.999))
    order, noise = batches(len(images), BATCH, setting.seed), torch.Generator().manual_seed(setting.seed)
    ones, zeros, loss = torch.ones(BATCH, 1), torch.zeros(BATCH, 1), F.binary_cross_entropy_with_logits
    for step in range(1, setting.pick(150, 400, 1200) + 1):
        generator.train()
        discriminator.train()
        real, fake = images[next(order)], generator(torch.randn(BATCH, NOISE, generator=noise)).detach()
        if arm == "joint":
            of_real, of_fake = discriminator(torch.cat([real, fake])).chunk(2)
        else:
            of_real, of_fake = scores_of(discriminator, real, "real", arm), scores_of(discriminator, fake, "fake", arm)
        of_discriminator.zero_grad()
        (loss(of_real, 0.9 * ones) + loss(of_fake, zeros)).backward()
        of_discriminator.step()

        fake = generator(torch.randn(BATCH, NOISE, generator=noise))
        of_generator.zero_grad()
        loss(scores_of(discriminator, fake, "fake", arm), ones).backward()
        of_generator.step()
        yield step, generator, discriminator


@torch.no_grad()
def judged(generator: nn.Module, split: Examples) -> tuple[float, float]:
    """The Fréchet distance between 1000 generated images and those of a split, and exp(entropy) of the classes of the former."""
    features, classes = judged_by()[1]
    noise = torch.randn(1000, NOISE, generator=torch.Generator().manual_seed(0))
    fake = features(generator.eval()(noise))
    shares = torch.bincount(classes(fake).argmax(1), minlength=10) / len(fake)
    real = features(in_range(split.images))
    return frechet_distance(fake, real), float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def error_rate(arm: str, generator: nn.Module, discriminator: nn.Module, split: Examples) -> float:
    """The error rate of the discriminator in inference; real and generated images have equal weight."""
    discriminator.eval()
    fake = generator.eval()(torch.randn(len(split), NOISE, generator=torch.Generator().manual_seed(1)))
    of_real = scores_of(discriminator, in_range(split.images), "real", arm)
    of_fake = scores_of(discriminator, fake, "fake", arm)
    return float((of_real < 0).float().mean() + (of_fake >= 0).float().mean()) / 2


def measure(arm: str, setting: Setting) -> Measured:
    """Train both, and compare images of the generator in inference with the test images."""
    test = judged_by()[0].test
    every, distances = setting.pick(150, 100), []
    classes = error = math.nan
    for step, generator, discriminator in trained(arm, setting, LEARNING_RATE[arm]):
        if step % every == 0:
            distance, classes = judged(generator, test)
            error = error_rate(arm, generator, discriminator, test)
            distances.append((step, distance))
    return Measured({"distance": distances[-1][1], "classes": classes, "error": error}, {"distance": distances})


METRICS = {
    "distance": Metric("Fréchet distance", ".1f", "lower"),
    "classes": Metric("effective number of classes", ".1f"),
    "error": Metric("discriminator's error in inference", ".1%", "neither"),
}
RULES = Rules(ARMS, METRICS)


EXPERIMENT = Experiment(
    name="gan",
    question="What does batch normalization do for a generator and a discriminator?",
    kind="application",
    claims={
        f"At learning rate .001, the best one with BN, BN in both networks makes the distance {RATIO:g} times smaller.": RULES.better(
            "distance", "both", "none", times=RATIO
        ),
        f"Each arm at its own best learning rate, BN in both networks makes the distance {RATIO:g} times smaller.": RULES.better(
            "distance", "both", "tuned", times=RATIO
        ),
        "BN in both networks makes the distance smaller than BN in one of them.": RULES.better(
            "distance", "both", "generator", "discriminator"
        ),
        f"Real and generated images in one batch of the discriminator make the distance {RATIO:g} times larger.": RULES.better(
            "distance", "both", "joint", times=RATIO
        ),
    },
    source="Radford et al. 2016 (DCGAN, arXiv:1511.06434), section 3: BN lets deep generators begin to learn",
    paper="",
    arms=ARMS,
    metrics=METRICS,
    measure=measure,
    curves={
        "distance": Curve(
            "Distance while learning", "steps", "Fréchet distance", "Lower is closer to real images.", log_y=True
        )
    },
    protocol=(
        "scikit-learn's digits at 16x16. DCGAN with one more convolution at each size, 16 channels; batches of 64, Adam (beta .5), real "
        "images labeled .9. Learning rate .001, with BN in both the best of .0002 to .004 on the validation images; for the plain "
        "networks tuned, in one network alone and in one batch the best of .001, .002, .004. 1000 generated images against the 360 "
        "test images, in 64 features of a classifier trained with noise."
        " Learning rates were chosen beforehand, with one seed at the default size."
    ),
    seconds=186,
    revised=(
        "One claim was judged by means, with the learning rate and the batches as conditions. It is now one claim for each "
        "effect, and BN in one network is compared too."
    ),
    timed_on=AVX2,
    cpu_only=True,
)
