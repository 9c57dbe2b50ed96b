"""One training loop for every classification experiment, and what can be measured on the way."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.errors import InputError
from batchnorm.lab.data import Examples


@dataclass(frozen=True)
class Schedule:
    """Stochastic gradient descent without weight decay: plain and at a constant learning rate, unless it says otherwise."""

    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    momentum: float = 0.0
    cosine: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        return (
            self.learning_rate * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2
            if self.cosine
            else self.learning_rate
        )


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices (size,) without end: a new permutation for every pass, the incomplete last batch dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def train(
    network: nn.Module,
    examples: Examples,
    schedule: Schedule,
    seen: Callable[[Examples], Examples] = lambda batch: batch,
) -> Iterator[tuple[int, float]]:
    """
    Train `network` in place; after each step yield its number, from 1, and the loss before it.

    Between two steps the caller may measure: `.grad` still holds the gradient that the step followed.
    Training ends early, after yielding it, at a loss that is not finite. `seen` makes of a batch what the network is shown.

    Raises:
        InputError: the examples do not fill a batch.
    """
    if len(examples) < schedule.batch_size:
        raise InputError(
            f"at least one batch of {schedule.batch_size} images must be left to learn from, but there are {len(examples)}: "
            "give more training images"
        )
    parameters = list(network.parameters())
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    order = batches(len(examples), schedule.batch_size, schedule.seed)
    for step in range(1, schedule.steps + 1):
        batch = seen(examples[next(order)])
        network.train()
        loss = F.cross_entropy(network(batch.images), batch.labels)
        network.zero_grad()
        loss.backward()
        _descend(parameters, velocities, schedule.rate(step), schedule.momentum)
        yield step, loss.item()
        if not math.isfinite(loss.item()):
            return


@torch.no_grad()
def _descend(parameters: list[nn.Parameter], velocities: list[Tensor], rate: float, momentum: float) -> None:
    """One step of `torch.optim.SGD`, to the bit; that one costs a worker seconds, for it imports torch's compiler."""
    for parameter, velocity in zip(parameters, velocities, strict=True):
        if parameter.grad is not None:
            direction = velocity.mul_(momentum).add_(parameter.grad) if momentum else parameter.grad
            parameter.add_(direction, alpha=-rate)


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
def look_inside(network: nn.Sequential, examples: Examples) -> tuple[float, Tensor]:
    """`accuracy`, and what the last activation receives in that same pass in evaluation mode, (N, units)."""
    network.eval()
    last = _last_activation(network)
    received = network[:last](examples.images)
    hits = int((network[last:](received).argmax(1) == examples.labels).sum())
    return hits / len(examples), received


@torch.no_grad()
def activation_input(network: nn.Sequential, examples: Examples) -> Tensor:
    """
    What the last activation of `network` receives for `examples`, as in training, (N, units).

    Batch normalization takes the statistics of these very examples and keeps its running statistics.
    """
    last = _last_activation(network)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    prefix = network[:last].train()
    try:
        return prefix(examples.images)
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])


def _last_activation(network: nn.Sequential) -> int:
    return max(index for index, layer in enumerate(network) if isinstance(layer, nn.ReLU | nn.Sigmoid))
