import torch


def backward(dy, x, gamma, eps):
    mean = x.mean(0)
    std = torch.sqrt(((x - mean) ** 2).mean(0) + eps)
    normalized = (x - mean) / std
    dnormalized = dy * gamma
    through_mean = dnormalized.mean(0)
    through_variance = normalized * (dnormalized * normalized).mean(0)
    dx = (dnormalized - through_mean - through_variance) / std
    return dx, (dy * normalized).sum(0), dy.sum(0)
