"""DP-SGD by hand: the gradient of each sample is clipped, and noise is added to the sum. Batch norm must leave first."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import batchnorm as bn
from batchnorm.lab.data import digits

CLIP, NOISE, BATCH, STEPS, RATE = 1.0, 0.6, 128, 120, 0.5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(144, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)),
    )


def private_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    gradients = bn.privacy.per_sample_gradients(model, cross_entropy, images, labels)
    lengths = torch.stack([each.flatten(1).norm(dim=1) for each in gradients.values()]).norm(dim=0)  # (N,)
    factors = (CLIP / lengths).clamp(max=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            total = torch.einsum("n,n...->...", factors, gradients[name])
            noisy = total + NOISE * CLIP * torch.randn_like(total)
            parameter -= RATE * noisy / len(images)


def main() -> None:
    data, model = digits.load(size=8), network()
    try:
        private_step(model, data.train.images[:BATCH], data.train.labels[:BATCH])
    except bn.errors.StateError as error:
        print(error)
    bn.convert(model, to="group")
    for chosen in torch.randint(len(data.train), (STEPS, BATCH)):
        private_step(model, data.train.images[chosen], data.train.labels[chosen])
    with torch.no_grad():
        found = model(data.test.images).argmax(1)
    print(f"with group norm: accuracy {(found == data.test.labels).float().mean():.2f}")


if __name__ == "__main__":
    main()
