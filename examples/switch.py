"""Switch a model's batch norms to ours in one line, make it faster in another, train it, and switch back."""

import torch
from torch import nn

import batchnorm as bn

torch.manual_seed(0)
x = torch.randn(512, 20)
y = (x[:, :5].sum(1) > 0).long()

model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
bn.convert(model)
bn.fuse(model)  # for speed: the activation goes into the batch norm's pass

optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(50):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

accuracy = (model.eval()(x).argmax(1) == y).float().mean()
print(f"{type(model[1]).__module__}: accuracy {accuracy:.3f}")
bn.revert(model)
same = (model(x).argmax(1) == y).float().mean()
print(f"{type(model[1]).__module__}: accuracy {same:.3f}")
