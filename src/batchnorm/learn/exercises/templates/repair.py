import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.output = nn.Linear(16, 3)

    def forward(self, x):
        return self.output(torch.relu(self.norm(self.hidden(x))))


def train(model, x, y, batch_size=8):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, labels in zip(x.split(batch_size), y.split(batch_size)):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def predict(model, x):
    return model(x)
