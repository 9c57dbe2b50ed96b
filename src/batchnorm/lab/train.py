"""One training loop for every classification experiment, and what can be measured on the way."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.lab.data import Examples


@dataclass(frozen=True)
class Schedule:
    """Plain stochastic gradient descent: constant learning rate, no momentum, no weight decay."""

    learning_rate: float
    steps: int
    batch_size: int
    seed: int


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices (size,) without end: a new permutation for every pass, the incomplete last batch dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def train(network: nn.Module, examples: Examples, schedule: Schedule) -> Iterator[tuple[int, float]]:
    """
    Train `network` in place; after each step yield its number, from 1, and the loss before it.

    Between two steps the caller may measure: `.grad` still holds the gradient that the step followed.
    Training ends early, after yielding it, at a loss that is not finite.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=schedule.learning_rate)
    order = batches(len(examples), schedule.batch_size, schedule.seed)
    for step in range(1, schedule.steps + 1):
        batch = examples[next(order)]
        network.train()
        loss = F.cross_entropy(network(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step, loss.item()
        if not math.isfinite(loss.item()):
            return


@torch.no_grad()
def accuracy(network: nn.Module, examples: Examples) -> float:
    """The share of `examples` that `network` classifies correctly in evaluation mode."""
    network.eval()
    hits = sum(
        int((network(images).argmax(1) == labels).sum())
        for images, labels in zip(examples.images.split(1000), examples.labels.split(1000), strict=True)
    )
    return hits / len(examples)


def gradient_norms(network: nn.Module) -> list[float]:
    """The Euclidean norm of the loss's gradient for the weight matrix of each linear layer, from input to output."""
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
    return [float(weight.grad.norm()) for weight in weights if weight.grad is not None]


@torch.no_grad()
def activation_input(network: nn.Sequential, examples: Examples) -> Tensor:
    """
    What the last activation of `network` receives for `examples`, as in training, (N, units).

    Batch normalization takes the statistics of these very examples and keeps its running statistics.
    """
    last = max(index for index, layer in enumerate(network) if isinstance(layer, nn.ReLU | nn.Sigmoid))
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    prefix = network[:last].train()
    try:
        return prefix(examples.images)
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
