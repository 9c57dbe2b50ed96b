"""Quantization-aware training with 2-bit weights: batch norms folded while they learn, frozen for the last steps, then folded away."""

import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, disable_observer
from torch.nn.functional import cross_entropy

import batchnorm as bn
from batchnorm.lab.data import Examples, digits

# torch's fake quantizer: signed, symmetric, 2 bits. torchao's, or a function of your own, fits as well.
two_bits = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-2,
    quant_max=1,
    dtype=torch.qint8,
    qscheme=torch.per_tensor_symmetric,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def train(model: nn.Module, examples: Examples, steps: int, rate: float, freeze_at: int | None = None) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), rate, momentum=0.9)
    for step, chosen in enumerate(torch.randint(len(examples), (steps, 64))):
        if step == freeze_at:
            bn.freeze(model, affine=False)  # running statistics from now on; weight and bias go on learning
            model.apply(disable_observer)  # and one range for the weights
        optimizer.zero_grad()
        cross_entropy(model(examples.images[chosen]), examples.labels[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples) -> float:
    return (model.eval()(examples.images).argmax(1) == examples.labels).float().mean().item()


def main() -> None:
    data, model = digits.load(size=8), network()
    train(model, data.train, steps=150, rate=0.05)
    print(f"float weights:           accuracy {accuracy(model, data.test):.2f}")
    quantized, report = bn.fold(model, data.train.images[:64], train=True, weight_fake_quant=two_bits)
    print(f"2 bits, {len(report.folded)} pairs:         accuracy {accuracy(quantized, data.test):.2f}")
    train(quantized, data.train, steps=150, rate=0.01, freeze_at=100)
    final, report = bn.fold(quantized, data.test.images[:64])
    print(f"2 bits, trained, folded: accuracy {accuracy(final, data.test):.2f}")
    print(f"{report.batch_norms_after} batch norms, {len(final.get_parameter('3.weight').unique())} different weights")


if __name__ == "__main__":
    main()
