"""Training or inference for the batch norms of a model alone, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from batchnorm.surgery.walker import batch_norms


@contextmanager
def training_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """In this context the batch norms of a model, torch's and ours, are in training or in inference; afterwards each as before.

    Other layers, such as dropout, do not change. Frozen layers normalize by their running statistics in both modes.

    Args:
        model: may be a single layer.
        mode: True for training.

    Raises:
        ArgumentError: if model is not a module.
    """
    layers = [(layer, layer.training) for layer in batch_norms(model).values()]
    try:
        for layer, _ in layers:
            layer.training = mode
        yield
    finally:
        for layer, before in layers:
            layer.training = before
