"""Handwritten digits, every image in a size of its own: normalized image by image, and as one batch."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import batchnorm as bn
from batchnorm.lab.data import load


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2), bn.BatchNorm2d(16, activation="relu")),
        *(nn.Conv2d(16, 32, 3, stride=2), bn.BatchNorm2d(32, activation="relu")),
        *(nn.Conv2d(32, 32, 3), bn.BatchNorm2d(32, activation="relu")),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def resized(image: torch.Tensor) -> torch.Tensor:
    """(1, 28, 28) -> (1, 1, H, W), H and W from 24 to 36."""
    return interpolate(image.unsqueeze(0), size=torch.randint(24, 37, (2,)).tolist(), mode="bilinear")


def main() -> None:
    digits = load()
    for together in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for batch in torch.randint(len(digits.train), (150, 16)):
            images = [resized(image) for image in digits.train.images[batch].view(-1, 1, 28, 28)]
            outputs = bn.as_one_batch(model, images) if together else [model(image) for image in images]
            loss = cross_entropy(torch.cat(outputs), digits.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        found = torch.cat([model(resized(image)) for image in digits.test.images.view(-1, 1, 28, 28)]).argmax(1)
        accuracy = (found == digits.test.labels).float().mean()
        print(f"{'as one batch:  ' if together else 'image by image:'} accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
