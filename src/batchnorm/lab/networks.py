"""The networks of the experiments, each with and without batch normalization."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from batchnorm.layers import BatchNorm1d

Normalization = Callable[[int], nn.Module]  # from a number of channels


def perceptron(
    sizes: Sequence[int], normalization: Normalization | None, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """
    Linear layers from `sizes[0]` to `sizes[-1]` features, with normalization and activation in between: (N, ...) to (N, sizes[-1]).

    After the same `torch.manual_seed`, weights are the same with and without batch normalization: linear layers have biases in both cases,
    so the random draws are equal. With batch normalization these biases have no effect.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes[:-1]):
        normalized = [] if normalization is None else [normalization(outputs)]
        layers += [nn.Linear(inputs, outputs), *normalized, activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def tutorial_network(batch_norm: bool) -> nn.Sequential:
    """The tutorial's 784-512-256-10 network: (N, 1, 28, 28) images to (N, 10) scores."""
    return perceptron((784, 512, 256, 10), BatchNorm1d if batch_norm else None)


class Bottleneck(nn.Module):
    """relu(body(x) + shortcut(x)), the body of 1x1, 3x3 and 1x1 convolutions (He et al. 2015, figure 5), the stride in the 3x3."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if inputs != outputs or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return self.relu(y)


def resnet50(classes: int = 1000) -> nn.Sequential:
    """ResNet-50 (He et al. 2015, arXiv:1512.03385, table 1) in torch's layers alone: (N, 3, H, W) images to (N, classes) scores."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride=2 if block == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
