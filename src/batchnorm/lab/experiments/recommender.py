"""Does batch normalization help a recommender, a wide network on sparse categories and heavy-tailed numbers?

If you know numbers to be heavy-tailed, you can take logarithms; otherwise the first layer of the network can normalize them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.data import clicks
from batchnorm.lab.experiment import AVX2, Curve, Experiment, Measured, Metric, Setting
from batchnorm.lab.rules import Rules
from batchnorm.lab.train import batches
from batchnorm.layers import BatchNorm1d

ARMS = {
    "none": "without BN",
    "input": "BN on the numbers",
    "hidden": "BN in the hidden layers",
    "both": "BN on both",
    "logarithm": "without BN, logarithms of the numbers",
}
BATCH, EMBEDDED, WIDTH = 256, 8, 256
LEARNING_RATE = {"none": 0.003, "input": 0.01, "hidden": 0.01, "both": 0.03, "logarithm": 0.01}
GAP = 0.02  # by how much BN must raise the area under the curve

load = lru_cache(maxsize=1)(clicks.load)


class Network(nn.Module):
    """A network from categories (N, 6) and numbers (N, 6) to the logit of a click (N,)."""

    def __init__(self, arm: str) -> None:
        super().__init__()
        self.logarithm = arm == "logarithm"
        self.embeddings = nn.ModuleList(nn.Embedding(size, EMBEDDED) for size in clicks.SIZES)
        self.numbers = BatchNorm1d(clicks.COUNTS) if arm in ("input", "both") else nn.Identity()

        def layer(inputs: int, outputs: int) -> list[nn.Module]:
            normalization = BatchNorm1d(outputs) if arm in ("hidden", "both") else nn.Identity()
            return [nn.Linear(inputs, outputs), normalization, nn.ReLU()]

        inputs = EMBEDDED * len(clicks.SIZES) + clicks.COUNTS
        self.layers = nn.Sequential(*layer(inputs, WIDTH), *layer(WIDTH, WIDTH), nn.Linear(WIDTH, 1))

    def forward(self, batch: clicks.Clicks) -> Tensor:
        numbers = self.numbers(batch.numbers.log() if self.logarithm else batch.numbers)
        embedded = [embedding(batch.categories[:, field]) for field, embedding in enumerate(self.embeddings)]
        return self.layers(torch.cat([*embedded, numbers], 1)).squeeze(1)


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """The probability that a positive example scores higher than a negative one; ties count half (Hanley & McNeil 1982)."""
    values, counts = scores.unique(return_counts=True)
    ranks = counts.cumsum(0) - (counts - 1) / 2  # the mean rank of equal scores, from 1
    of_positive = ranks[torch.searchsorted(values, scores[positive])].double()
    N = int(positive.sum())
    return float((of_positive.sum() - N * (N + 1) / 2) / (N * (len(scores) - N)))


@torch.no_grad()
def judged(network: nn.Module, split: clicks.Clicks) -> float:
    """The area under the curve in inference."""
    return area_under_curve(network.eval()(split), split.clicked)


def trained(arm: str, setting: Setting, rate: float) -> Iterator[tuple[int, Network]]:
    """Train, and yield the network after each step, from 1."""
    train = load(*setting.pick((20_000, 5000), (60_000, 10_000))).train
    torch.manual_seed(setting.seed)
    network, order = Network(arm), batches(len(train), BATCH, setting.seed)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    for step in range(1, setting.pick(150, 450, 900) + 1):
        batch = train[next(order)]
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(network.train()(batch), batch.clicked.float()).backward()
        optimizer.step()
        yield step, network


def measure(arm: str, setting: Setting) -> Measured:
    """Train, and measure on the test split."""
    split, every = load(*setting.pick((20_000, 5000), (60_000, 10_000))), setting.pick(50, 75)
    curve = [
        (step, judged(network, split.test))
        for step, network in trained(arm, setting, LEARNING_RATE[arm])
        if step % every == 0
    ]
    return Measured(
        {"area": curve[-1][1], "possible": area_under_curve(split.planted, split.test.clicked)}, {"area": curve}
    )


METRICS = {
    "area": Metric("area under the curve", ".3f"),
    "possible": Metric("area under the curve of the planted chances", ".3f", "neither"),
}
RULES = Rules(ARMS, METRICS)


EXPERIMENT = Experiment(
    name="recommender",
    question="Does batch normalization help a recommender, a wide network on sparse categories and heavy-tailed numbers?",
    kind="application",
    claims={
        f"With BN on the numbers and in the hidden layers the area under the curve is at least {GAP} larger.": RULES.better(
            "area", "both", "none", by=GAP
        ),
        f"With BN the area under the curve is at least {GAP} larger than with logarithms of the numbers instead.": RULES.better(
            "area", "both", "logarithm", by=GAP
        ),
    },
    source="the tutorial, section 6",
    paper="",
    arms=ARMS,
    metrics=METRICS,
    measure=measure,
    curves={
        "area": Curve(
            "While learning",
            "steps",
            "area under the curve",
            "Higher is better; compare BN with logarithms of the numbers, too.",
        )
    },
    protocol=(
        "60000 synthetic views to train, 10000 each to validate and test: six fields of up to 2000 categories, six log-normal numbers of "
        "scales 1 to 10000, clicks by planted tastes. Embeddings of 8, two hidden layers of 256, Adam, batches of 256; the learning "
        "rate of each arm is the best of .001, .003, .01, .03 on the validation part."
        " Learning rates were chosen beforehand, with one seed at the default size."
    ),
    seconds=18,
    revised=(
        "One claim was judged by means, with the logarithms as a condition of its verdict. The comparison with this simpler "
        "remedy is a claim of its own now."
    ),
    timed_on=AVX2,
    cpu_only=True,
)
