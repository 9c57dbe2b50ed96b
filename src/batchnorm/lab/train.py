"""The training loop of the classification experiments, and measurements during training."""

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
    """Stochastic gradient descent without weight decay; by default without momentum, at a constant learning rate."""

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
    """An endless iterator of indices (size,): a new permutation for every pass, without the incomplete last batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size)


def train(
    network: nn.Module,
    examples: Examples,
    schedule: Schedule,
    transform: Callable[[Examples], Examples] = lambda batch: batch,
) -> Iterator[tuple[int, float]]:
    """
    Train `network` in place; after each step yield its number, from 1, and the loss before it.

    Between two steps the caller may measure; `.grad` still has the gradient of the last step.
    If a loss is not finite, training yields it and ends. `transform` is applied to each batch.

    Raises:
        InputError: there are fewer examples than a batch needs.
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
        batch = transform(examples[next(order)])
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
    """One step, bit-identical to `torch.optim.SGD`, which would import torch's compiler and cost each worker seconds."""
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


def euclidean_norm(*tensors: Tensor) -> float:
    """The Euclidean norm of all elements together, in float64: in float32 the squares of elements below 1e-23 vanish."""
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))


def gradient_norms(network: nn.Module) -> list[float]:
    """The Euclidean norm of the loss's gradient for the weight matrix of each linear layer, from input to output."""
    weights = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)]
    return [euclidean_norm(weight.grad) for weight in weights if weight.grad is not None]


@torch.no_grad()
def look_inside(network: nn.Sequential, examples: Examples) -> tuple[float, Tensor]:
    """`accuracy`, and the input of the last activation in the same pass in evaluation mode, (N, units)."""
    network.eval()
    last = _last_activation(network)
    received = network[:last](examples.images)
    hits = int((network[last:](received).argmax(1) == examples.labels).sum())
    return hits / len(examples), received


@torch.no_grad()
def activation_input(network: nn.Sequential, examples: Examples) -> Tensor:
    """
    The input of the last activation of `network` for `examples` in training mode, (N, units).

    Batch normalization uses the statistics of these examples, and its running statistics do not change.
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
