"""Sequences of different lengths: padding must not enter the statistics."""

import torch

import batchnorm as bn

torch.manual_seed(0)
lengths = torch.tensor([20, 7, 12, 3])
mask = torch.arange(20) < lengths.unsqueeze(1)  # (N, L), True where there is a token
tokens = torch.randn(4, 16, 20) * 3 + 5  # (N, C, L)
padded = torch.where(mask.unsqueeze(1), tokens, 0.0)


def spread(y: torch.Tensor) -> str:
    valid = y.movedim(1, -1)[mask]  # (tokens, C)
    return f"mean {valid.mean():+.2f}, deviation {valid.std(0, unbiased=False).mean():.2f}"


print("padding counted:    ", spread(bn.BatchNorm1d(16)(padded)))
print("padding masked out: ", spread(bn.BatchNorm1d(16)(padded, mask=mask)))
