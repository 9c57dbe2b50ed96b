"""Watches batch norms in a training loop: layers that were loaded with a momentum of another library are found, and warned about once."""

import warnings

import torch
from torch import nn

import batchnorm as bn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64, momentum=0.99), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as told, bn.diagnostics.Monitor(model, every=20) as monitor:
        warnings.simplefilter("always")
        for _ in range(100):
            x = torch.randn(64, 20)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), (x[:, :5].sum(1) > 0).long()).backward()
            optimizer.step()
    print(*(warning.message for warning in told), sep="\n")
    print(f"{monitor.looks} looks in {monitor.steps} steps: {[finding.code for finding in monitor.findings]}")


if __name__ == "__main__":
    main()
