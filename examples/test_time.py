"""A network trained on clean digits meets a low contrast: mixed batches, then batches of one class, with and without the guard."""

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.lab.data import digits
from batchnorm.lab.networks import perceptron

torch.manual_seed(0)
data = digits.load(size=8)
model = perceptron((64, 128, 128, 10), nn.BatchNorm1d)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(200):
    part = torch.randint(len(data.train), (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(data.train.images[part]), data.train.labels[part]).backward()
    optimizer.step()
model.eval()

mixed = torch.randperm(len(data.test)).split(60)
one_class = [torch.nonzero(data.test.labels == label).flatten() for label in range(10)]


def pale(images: Tensor) -> Tensor:
    return 0.2 * images + 1.5


def clean(images: Tensor) -> Tensor:
    return images


for name, seen, batches in (("pale, mixed", pale, mixed), ("clean, one class", clean, one_class)):
    networks = {
        "as trained": model,
        "statistics": bn.adapt(model, "statistics", guard=False),
        "tent with guard": bn.adapt(model, "tent"),
    }
    print(f"{name}:", end="")
    for label, network in networks.items():
        hits = [network(seen(data.test.images[part])).argmax(1) == data.test.labels[part] for part in batches]
        print(f" {label} {torch.cat(hits).float().mean():.2f}", end="")
    print()
