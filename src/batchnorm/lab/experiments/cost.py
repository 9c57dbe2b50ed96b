"""How much batch normalization adds to the time of a training step, and to the memory saved for its backward.

Each arm alternates with the network without normalization, so that a busy machine affects both sides of a ratio.
"""

import gc
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.data import digits
from batchnorm.lab.experiment import AVX2, Experiment, Measured, Metric, Results, Setting, Verdict
from batchnorm.lab.image_networks import resnet, vgg
from batchnorm.lab.networks import Normalization, perceptron
from batchnorm.lab.rules import Rules, beats, verdict
from batchnorm.measure import saved_bytes
from batchnorm.surgery import convert

BATCH = 64
NEAR = 0.02  # by how much longer, relative to a step without normalization, counts as no longer
NETWORKS: dict[str, tuple[str, type[nn.Module], Callable[[Normalization | None], nn.Module]]] = {
    "mlp": ("MLP", nn.BatchNorm1d, lambda norm: perceptron((256, 512, 256, 10), norm)),
    "vgg": ("VGG", nn.BatchNorm2d, vgg),
    "resnet": ("ResNet", nn.BatchNorm2d, resnet),
}
ARMS = {"torch": "torch's layers", "ours": "ours", "save_memory": "ours, save_memory=True"}


def measure(arm: str, setting: Setting) -> Measured:
    batch = digits.load(size=16).train[torch.arange(BATCH)]
    images, labels = batch.images, batch.labels
    values = dict[str, float]()
    for name, (_, layer, build) in NETWORKS.items():
        torch.manual_seed(setting.seed)
        plain, normalized = build(None), build(layer)
        if arm != "torch":
            convert(normalized, fuse=True, save_memory=arm == "save_memory")
        values[f"memory_{name}"] = _saved(normalized, images, labels) / _saved(plain, images, labels)
        rounds = setting.pick(15, 60, 300)
        times = _in_turns([lambda net=net: _step(net, images, labels) for net in (plain, normalized)], rounds)
        values[f"time_{name}"] = times[1] / times[0]
    return Measured(values)


def _step(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()


def _in_turns(steps: list[Callable[[], None]], rounds: int) -> list[float]:
    """The median processor seconds of each function, called alternately."""
    taken: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 3):
        for step, times in zip(steps, taken, strict=True):
            start = time.thread_time()
            step()
            if number >= 3:  # the first calls allocate
                times.append(time.thread_time() - start)
    return [median(times) for times in taken]


def _saved(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that a forward saves for its backward; collects garbage first, so that nothing is freed during the forward."""
    gc.collect()
    return saved_bytes(lambda: F.cross_entropy(network(images), labels))


METRICS = {
    f"{what}_{name}": Metric(f"{what}, {label}", ".2f", "lower")
    for what in ("time", "memory")
    for name, (label, *_) in NETWORKS.items()
}
RULES = Rules(ARMS, METRICS)
CONVOLUTIONAL, HALF = ("vgg", "resnet"), 0.5


def _told(results: Results, what: str) -> str:
    return " ".join(RULES.told(results, f"{what}_{name}", *ARMS) for name in CONVOLUTIONAL)


def _saved_half(results: Results) -> Verdict:
    """Whether at least half of the memory that batch normalization adds is saved, in every convolutional network and with every seed."""
    halves = {
        name: [1 + HALF * (kept - 1) for kept in results.values("torch", f"memory_{name}")] for name in CONVOLUTIONAL
    }
    saved = {name: results.values("save_memory", f"memory_{name}") for name in CONVOLUTIONAL}
    holds = all(beats(METRICS[f"memory_{name}"], saved[name], halves[name]) for name in CONVOLUTIONAL)
    return verdict(holds, _told(results, "memory"))


def _no_slower(results: Results) -> Verdict:
    holds = all(RULES.beats(results, f"time_{name}", "save_memory", "torch", by=-NEAR) for name in CONVOLUTIONAL)
    return verdict(holds, _told(results, "time"))


EXPERIMENT = Experiment(
    name="cost",
    question="What does batch normalization cost in time and memory, and how much of the memory can be saved?",
    kind="remedy",
    claims={
        (
            "In convolutional networks most of the memory that BN adds for the backward can be saved by computing its outputs again."
        ): _saved_half,
        "Steps that compute the outputs again take no more time than steps with torch's layers.": _no_slower,
    },
    source="Rota Bulò et al. 2018 (arXiv:1712.02616); Pleiss et al. 2017 (arXiv:1707.06990)",
    paper="up to 50 % of activation memory for 0.8 to 2 % of time (Rota Bulò); 2.86 to 1.61 GB for 15 to 20 % of time (Pleiss)",
    arms=ARMS,
    metrics=METRICS,
    measure=measure,
    protocol=(
        f"Forward and backward of {BATCH} images of 16x16 pixels through 256-512-256-10, a VGG- and a ResNet-like network, one thread "
        "of the CPU, each in turns with the same network without normalization: medians of 60 turns (quick: 15, full: 300) of processor "
        "time, as a ratio. Memory: bytes that a forward leaves allocated for its backward, as a ratio."
    ),
    seconds=84,
    revised=(
        "One claim joined memory and time, and counted as held in part, although the time is longer. It is now one claim for "
        "each, and every seed counts instead of means."
    ),
    timed_on=AVX2,
    cpu_only=True,
)
