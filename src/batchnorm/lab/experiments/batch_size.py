"""How much accuracy small normalization batches lose, and how much of it each remedy recovers.

The normalization batch is independent of SGD's batch: every batch of 64 passes the linear layers at once and each batch norm in groups, as
if each group were on its own device. Only the statistics differ. Every group updates the running statistics, with a momentum of 0.1 per 64
samples. There are two settings: random groups of images with noise of 1.5 deviations; and groups of a batch sorted by class, without
noise, so that each group has one or two classes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from batchnorm.lab.data import Examples, digits
from batchnorm.lab.experiment import AVX2, Curve, Experiment, Judge, Measured, Metric, Results, Setting, Verdict
from batchnorm.lab.networks import perceptron
from batchnorm.lab.rules import Rules, beats, verdict
from batchnorm.lab.train import Schedule, accuracy, train
from batchnorm.language import tr
from batchnorm.layers import BatchNorm1d
from batchnorm.statistics import Batch, Ghost, MovingAverage, Renorm, Statistics
from batchnorm.surgery import freeze

BATCH = 64
NOISE = 1.5
SMALL = {"noise": 2, "sorted": 4}  # normalization batch at which the remedies are judged
PROMISED = {"noise": 0.60, "sorted": 0.85}  # share of plain's loss that must be recovered


class InGroups(nn.Module):
    """A layer that is applied to groups of `size` samples separately in training."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(group) for group in x.split(self.size)]) if self.training else self.layer(x)


def _grouped(source: Statistics, channels: int, size: int) -> nn.Module:
    return InGroups(BatchNorm1d(channels, momentum=0.1 * size / BATCH, statistics=source), size)


# Each creates a layer from the number of channels, the size of the normalization batch, and the number of training steps.
LAYERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "plain": lambda channels, size, _: _grouped(Batch(), channels, size),
    # Groups within one call; the whole batch updates the running statistics.
    "ghost": lambda channels, size, _: BatchNorm1d(channels, statistics=Ghost(size)),
    # Plain normalization for 1/20 of the training, full bounds after 2/5.
    "renorm": lambda channels, size, steps: _grouped(Renorm(warmup=steps * BATCH // size // 20), channels, size),
    # Averages over the groups of one batch.
    "moving_average": lambda channels, size, steps: _grouped(
        MovingAverage(BATCH // size, warmup=steps * (BATCH // size) // 20), channels, size
    ),
    # Frozen for the last fifth (Wu & Johnson 2021, section 3.4).
    "frozen": lambda channels, size, _: _grouped(Batch(), channels, size),
    # A comparison that does not use batch statistics.
    "group_norm": lambda channels, *_: nn.GroupNorm(8, channels),
}


def errors(arm: str, setting: str, size: int, seed: int, epochs: int, device: str = "cpu") -> tuple[float, float]:
    """The error rates on validation and test images after one training."""
    data, noise = digits.load().to(device), NOISE if setting == "noise" else 0.0
    drawn = torch.Generator().manual_seed(99)
    held_out = torch.cat([data.validation.images, data.test.images])
    held_out = held_out + noise * torch.randn(held_out.shape, generator=drawn).to(device)
    validation, test = held_out.split([len(data.validation), len(data.test)])

    drawn = torch.Generator().manual_seed(seed)

    def transform(batch: Examples) -> Examples:
        if setting == "sorted":
            return batch[batch.labels.argsort(stable=True)]
        return replace(batch, images=batch.images + noise * torch.randn(batch.images.shape, generator=drawn).to(device))

    steps = epochs * (len(data.train) // BATCH)
    torch.manual_seed(seed)
    network = perceptron((784, 512, 256, 10), lambda channels: LAYERS[arm](channels, size, steps)).to(device)
    for step, _ in train(network, data.train, Schedule(0.05, steps, BATCH, seed, momentum=0.9, cosine=True), transform):
        if arm == "frozen" and step == steps * 4 // 5:
            freeze(network, affine=False)
    return (
        1 - accuracy(network, replace(data.validation, images=validation)),
        1 - accuracy(network, replace(data.test, images=test)),
    )


def measure(arm: str, setting: Setting) -> Measured:
    sizes = {
        "noise": setting.pick((64, 2), (64, 8, 4, 2), (64, 32, 16, 8, 4, 2)),
        "sorted": setting.pick((64, 4), (64, 16, 4), (64, 32, 16, 8, 4)),
    }
    epochs = setting.pick(5, 10, 30)
    values, curves = dict[str, float](), dict[str, list[tuple[float, float]]]()
    for kind, tried in sizes.items():
        # Group norm does not depend on the batch, so one run is enough.
        once = {
            size: errors(arm, kind, size, setting.seed, epochs, setting.device)
            for size in (tried[:1] if arm == "group_norm" else tried)
        }
        found = {size: once.get(size, once[BATCH]) for size in tried}
        for size in (BATCH, SMALL[kind]):
            values[f"{kind}_{size}"] = found[size][1]
            values[f"{kind}_{size}_validation"] = found[size][0]
        curves[kind] = [(size, found[size][1]) for size in sorted(tried)]
    return Measured(values, curves)


def recovered(results: Results, kind: str) -> tuple[str, list[float]]:
    """The remedy with the best validation error at the small normalization batch; by seed, how much of plain's loss it recovers on test."""
    small, large = f"{kind}_{SMALL[kind]}", f"{kind}_{BATCH}"
    remedies = [arm for arm in LAYERS if arm not in ("plain", "group_norm")]
    best = min(remedies, key=lambda arm: results.mean(arm, f"{small}_validation"))
    errors = zip(
        results.values("plain", small), results.values("plain", large), results.values(best, small), strict=True
    )
    return best, [(most - left) / (most - least) if most > least else 0.0 for most, least, left in errors]


def _costs(kind: str) -> Judge:
    """A judge of the claim that every seed of plain batch normalization has more errors in small groups than every seed in large ones."""
    small, large = f"{kind}_{SMALL[kind]}", f"{kind}_{BATCH}"

    def judge(results: Results) -> Verdict:
        holds = beats(METRICS[small], results.values("plain", large), results.values("plain", small))
        return verdict(holds, f"{RULES.told(results, small, 'plain')} {RULES.told(results, large, 'plain')}")

    return judge


def _recovers(kind: str) -> Judge:
    """A judge of the claim that the remedy recovers the promised share with every seed."""

    def judge(results: Results) -> Verdict:
        best, shares = recovered(results, kind)
        holds = all(share >= PROMISED[kind] for share in shares)
        told = ", ".join(f"{share:.0%}" for share in shares)
        evidence = tr(
            "{arm} is the best on validation. For each seed, share of the loss that it recovers on test: {shares}.",
            arm=tr(ARMS[best]),
            shares=told,
        )
        return verdict(holds, evidence)

    return judge


def _better_than_group_norm(kind: str) -> Judge:
    """A judge of the claim that the remedy has fewer errors than GroupNorm."""

    def judge(results: Results) -> Verdict:
        return RULES.better(f"{kind}_{SMALL[kind]}", recovered(results, kind)[0], "group_norm")(results)

    return judge


ARMS = {
    "plain": "plain",
    "ghost": "Ghost",
    "renorm": "Renorm",
    "moving_average": "MovingAverage",
    "frozen": "frozen for the last fifth",
    "group_norm": "GroupNorm",
}
METRICS = {
    f"{kind}_{size}": Metric(f"error, {'random' if kind == 'noise' else 'sorted'} groups of {size}", ".1%", "lower")
    for kind, small in SMALL.items()
    for size in (BATCH, small)
}
RULES = Rules(ARMS, METRICS)
EXPERIMENT = Experiment(
    name="batch-size",
    question="What do small normalization batches cost, and which remedy recovers it?",
    kind="remedy",
    claims={
        f"Random normalization batches of {SMALL['noise']} instead of {BATCH} cost accuracy.": _costs("noise"),
        f"Normalization batches of {SMALL['sorted']} instead of {BATCH}, sorted by class, cost accuracy.": _costs(
            "sorted"
        ),
        f"The best remedy on validation recovers at least {PROMISED['noise']:.0%} of what random ones cost.": _recovers(
            "noise"
        ),
        f"The best remedy on validation recovers at least {PROMISED['sorted']:.0%} of what sorted ones cost.": _recovers(
            "sorted"
        ),
        "In random ones the best remedy is more accurate than GroupNorm, which needs no batch.": _better_than_group_norm(
            "noise"
        ),
        "In sorted ones the best remedy is more accurate than GroupNorm, which needs no batch.": _better_than_group_norm(
            "sorted"
        ),
    },
    source=(
        "Ioffe 2017 (arXiv:1702.03275); Wu & He 2018 (arXiv:1803.08494); Yan et al. 2020 (arXiv:2001.06838); Wu & Johnson 2021 "
        "(arXiv:2105.07576)"
    ),
    paper=(
        "ImageNet, error at normalization batch 2: BN 35.2 %, renorm 30.3 %, moving averages 23.7 % (Yan et al.); BN at 32: 23.6 % "
        "(Wu & He)"
    ),
    arms=ARMS,
    metrics=METRICS,
    measure=measure,
    curves={
        "noise": Curve(
            "Test error, groups at random, noisy images",
            "normalization batch",
            "test error",
            "From right to left each mean and variance is taken over fewer images. Compare how far each line rises; lower is better.",
            log_x=True,
        ),
        "sorted": Curve(
            "Test error, batches sorted by class",
            "normalization batch",
            "test error",
            "From right to left a normalization batch has fewer images and classes. Compare how far each line rises; lower is better.",
            log_x=True,
        ),
    },
    protocol=(
        f"784-512-256-10 with ReLU on digits of 28x28 pixels; SGD with batches of {BATCH}, momentum 0.9, learning rate 0.05 with a cosine "
        "schedule, 10 epochs (quick: 5, full: 30) for all arms. Batch norms normalize random groups, with noise of 1.5 deviations on all "
        "images; or groups of a batch sorted by class, without noise. The judged remedy is chosen on validation; errors are of test "
        "images, normalized by the running statistics."
    ),
    seconds=125,
    revised=(
        "One claim joined two costs and two remedies, and was judged by means. It is now one claim for each, every seed counts, "
        "and the remedies are compared with the simplest one, GroupNorm."
    ),
    timed_on=AVX2,
)
