"""Fine-tuning with frozen batch norms: what a step saves for the backward, and that it learns the same."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import batchnorm as bn
from batchnorm.lab.data import digits
from batchnorm.measure import saved_bytes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        *(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def main() -> None:
    data, model = digits.load(size=16), network()
    images, labels = data.train.images[:64], data.train.labels[:64]
    for _ in range(10):
        model(images)  # settles the running statistics
    variants = {
        "torch, in eval mode": copy.deepcopy(model).eval(),
        "frozen": bn.freeze(copy.deepcopy(model)).train(),
        "weight and bias learn": bn.freeze(copy.deepcopy(model), affine=False, save_memory=True).train(),
    }
    for name, tuned in variants.items():

        def loss(tuned: nn.Module = tuned) -> torch.Tensor:
            return cross_entropy(tuned(images), labels)

        saved = saved_bytes(loss)
        optimizer = torch.optim.SGD((value for value in tuned.parameters() if value.requires_grad), 0.01, momentum=0.9)
        for _ in range(40):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        print(f"{name:<22} {saved / 1e6:.1f} MB saved, loss {loss().item():.4f}")


if __name__ == "__main__":
    main()
