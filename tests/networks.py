"""Small networks, and layers as other libraries have them, that several tests use."""

import torch
from torch import nn


class FrozenBatchNorm2d(nn.Module):
    """A frozen batch norm as in torchvision and detectron2: buffers, no parameters."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def settle(model: nn.Module) -> nn.Module:
    """Give batch norms statistics, weights and biases that are not those of a new layer; deterministic."""
    generator = torch.Generator().manual_seed(3)

    def drawn(value: torch.Tensor, low: float, high: float) -> None:
        with torch.no_grad():
            value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            drawn(module.running_mean, -1, 1)
            drawn(module.running_var, 0.5, 2)
        if getattr(module, "running_var", None) is not None and module.weight is not None:
            drawn(module.weight, -1.5, 1.5)
            if module.bias is not None:
                drawn(module.bias, -1, 1)
    return model
