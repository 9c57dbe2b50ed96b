import torch


def backward(dy, x, gamma, eps):
    raise NotImplementedError
