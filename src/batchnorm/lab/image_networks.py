"""Small versions of three image networks, for images (N, channels, 16, 16): the same structure with fewer channels.

`normalization` creates a layer for a number of channels, placed after each convolution; without it, the convolution has a bias.
"""

from torch import Tensor, nn

from batchnorm.lab.networks import Normalization


def convolution(
    normalization: Normalization | None, inputs: int, outputs: int, size: int = 3, stride: int = 1
) -> list[nn.Module]:
    """A padded convolution, and its normalization."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=normalization is None)
    return [layer] if normalization is None else [layer, normalization(outputs)]


def alexnet(normalization: Normalization | None, channels: int = 1) -> nn.Sequential:
    """Five convolutions, the first of 5x5, and two linear layers (Krizhevsky et al. 2012)."""
    return nn.Sequential(
        *convolution(normalization, channels, 24, size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *convolution(normalization, 24, 48),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *convolution(normalization, 48, 64),
        nn.ReLU(),
        *convolution(normalization, 64, 48),
        nn.ReLU(),
        *convolution(normalization, 48, 48),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def vgg(normalization: Normalization | None, channels: int = 1) -> nn.Sequential:
    """Twelve convolutions of 3x3 in three stages, and one linear layer (Simonyan & Zisserman 2015)."""
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (16, 32, 64):
        for _ in range(4):
            layers += [*convolution(normalization, inputs, outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 10))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)); the body has two 3x3 convolutions (He et al. 2015, figure 5)."""

    def __init__(self, normalization: Normalization | None, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(normalization, inputs, outputs, stride=stride),
            nn.ReLU(),
            *convolution(normalization, outputs, outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Sequential(*([] if same else convolution(normalization, inputs, outputs, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def resnet(normalization: Normalization | None, channels: int = 1) -> nn.Sequential:
    """A convolution, six residual blocks in three stages, an average over each map, one linear layer (He et al. 2015)."""
    layers: list[nn.Module] = [*convolution(normalization, channels, 16), nn.ReLU()]
    inputs = 16
    for outputs in (16, 32, 64):
        for block in range(2):
            stride = 2 if block == 0 and outputs > 16 else 1
            layers.append(Residual(normalization, inputs, outputs, stride))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
