"""An average of the weights (EMA) with four kinds of running statistics: its test loss after 1 to 200 steps of training."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm as bn
from batchnorm.lab.data import digits
from batchnorm.lab.networks import perceptron

torch.manual_seed(0)
data, decay = digits.load(size=8), 0.99
model = perceptron((64, 128, 128, 10), nn.BatchNorm1d)


def average(use_buffers: bool = False) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)


def loss(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(network.eval()(data.test.images), data.test.labels)


averages = {"tracked": average(), "the model's": average(), "averaged": average(use_buffers=True)}
bn.track(model, averages["tracked"])  # the only line that differs

optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for step in range(1, 201):
    part = torch.randint(len(data.train), (64,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model.train()(data.train.images[part]), data.train.labels[part]).backward()
    optimizer.step()
    for each in averages.values():
        each.update_parameters(model)
    if step in (1, 10, 50, 200):
        exact = bn.recalibrate(copy.deepcopy(averages["tracked"].module), data.train.images.split(64))
        rows = {"recalibrated": loss(exact), **{name: loss(each) for name, each in averages.items()}}
        print(f"{step:3} steps: " + ", ".join(f"{name} {value:.2f}" for name, value in rows.items()))
