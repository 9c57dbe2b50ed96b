"""The networks whose training steps are timed, in torch's layers alone, with the size of their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.lab.networks import perceptron, resnet50


@dataclass(frozen=True)
class Network:
    """A network and its input.

    Attributes:
        build: makes the network; its output is (N, classes, *S).
        sample: the shape of one sample, (C, *S) or (C,).
        batch: the usual number of samples, and that of `--quick`.
    """

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    batch: tuple[int, int]


class Block(nn.Module):
    """body(x) + shortcut(x), and an activation."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and its batch norm."""
    padding = size // 2
    return [
        nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def _classifier(features: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def resnet18() -> nn.Module:
    """ResNet-18 (He et al. 2015, arXiv:1512.03385, table 1)."""
    layers = [*_convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width in (64, 128, 256, 512):
        for stride in (2 if width > 64 else 1, 1):
            body = [*_convolution(inputs, width, 3, stride), nn.ReLU(inplace=True), *_convolution(width, width, 3)]
            same = inputs == width and stride == 1
            shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, width, 1, stride))
            layers.append(Block(nn.Sequential(*body), shortcut, nn.ReLU(inplace=True)))
            inputs = width
    return nn.Sequential(*layers, *_classifier(512, 1000))


def mobilenet() -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381, table 2): depthwise convolutions between thin layers."""
    layers = [*_convolution(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    inputs = 32
    for expansion, width, blocks, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for block in range(blocks):
            stride, hidden = first_stride if block == 0 else 1, inputs * expansion
            body = [*_convolution(inputs, hidden, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
            body += [*_convolution(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True)]
            thin = nn.Sequential(*body, *_convolution(hidden, width, 1))
            layers.append(Block(thin, nn.Identity(), nn.Identity()) if stride == 1 and inputs == width else thin)
            inputs = width
    return nn.Sequential(*layers, *_convolution(320, 1280, 1), nn.ReLU6(inplace=True), *_classifier(1280, 1000))


class _Level(nn.Module):
    """One level of a U-Net: convolutions, the level below at half the resolution, convolutions of both together."""

    def __init__(self, inputs: int, width: int, below: nn.Module | None) -> None:
        super().__init__()
        self.down, self.below = _twice(inputs, width), below
        if below is not None:
            self.pool, self.enlarge = nn.MaxPool2d(2), nn.ConvTranspose2d(2 * width, width, 2, 2)
            self.up = _twice(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        if self.below is None:
            return y
        return self.up(torch.cat([y, self.enlarge(self.below(self.pool(y)))], 1))


def _twice(inputs: int, width: int) -> nn.Sequential:
    first, second = _convolution(inputs, width, 3), _convolution(width, width, 3)
    return nn.Sequential(*first, nn.ReLU(inplace=True), *second, nn.ReLU(inplace=True))


def unet() -> nn.Module:
    """A U-Net of four levels (Ronneberger et al. 2015, arXiv:1505.04597, figure 1), half as wide, with batch norms."""
    level: nn.Module | None = None
    for width, inputs in ((256, 128), (128, 64), (64, 32), (32, 3)):
        level = _Level(inputs, width, level)
    assert level is not None
    return nn.Sequential(level, nn.Conv2d(32, 21, 1))


class _Conformer(nn.Module):
    """A conformer block (Gulati et al. 2020, arXiv:2005.08100, figure 1) of (N, C, T), with attention of four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = _feed_forward(width), _feed_forward(width)
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.convolution = nn.Sequential(
            nn.Conv1d(width, 2 * width, 1),
            nn.GLU(1),
            nn.Conv1d(width, width, 31, padding=15, groups=width),
            nn.BatchNorm1d(width),
            nn.SiLU(inplace=True),
            nn.Conv1d(width, width, 1),
        )
        self.last = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y = y + self.before(y) / 2
        normalized = self.norm(y)
        y = y + self.attention(normalized, normalized, normalized, need_weights=False)[0]
        y = y + self.convolution(y.transpose(1, 2)).transpose(1, 2)
        return self.last(y + self.after(y) / 2).transpose(1, 2)


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


def conformer() -> nn.Module:
    """Four conformer blocks of width 144 on 80 filter banks: (N, 80, T) to (N, 32, T)."""
    return nn.Sequential(nn.Conv1d(80, 144, 1), *(_Conformer(144) for _ in range(4)), nn.Conv1d(144, 32, 1))


def mlp() -> nn.Module:
    """The tutorial's 784-512-256-10 network."""
    return perceptron((784, 512, 256, 10), nn.BatchNorm1d)


NETWORKS = {
    "resnet18": Network(resnet18, (3, 224, 224), (8, 2)),
    "resnet50": Network(resnet50, (3, 224, 224), (16, 2)),
    "mobilenet": Network(mobilenet, (3, 224, 224), (8, 2)),
    "unet": Network(unet, (3, 128, 128), (4, 2)),
    "conformer": Network(conformer, (80, 256), (8, 2)),
    "mlp": Network(mlp, (784,), (256, 32)),
}
