"""A network trained with batch norm goes on with group norm: converted, then tuned for a few steps, here one image at a time."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import batchnorm as bn
from batchnorm.lab.data import Examples, digits


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def train(model: nn.Module, examples: Examples, steps: int, batch: int, rate: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    model.train()
    for chosen in torch.randint(len(examples), (steps, batch)):
        optimizer.zero_grad()
        cross_entropy(model(examples.images[chosen]), examples.labels[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples) -> float:
    return (model.eval()(examples.images).argmax(1) == examples.labels).float().mean().item()


def main() -> None:
    data, model = digits.load(size=16), network()
    train(model, data.train, steps=100, batch=64, rate=0.1)
    print(f"batch norm:           accuracy {accuracy(model, data.test):.2f}")
    bn.convert(model, to="group")
    print(f"as group norm:        accuracy {accuracy(model, data.test):.2f}")
    train(model, data.train, steps=400, batch=1, rate=0.003)
    print(f"tuned image by image: accuracy {accuracy(model, data.test):.2f}")
    print(model[1], model[4])


if __name__ == "__main__":
    main()
