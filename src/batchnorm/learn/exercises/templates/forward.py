import torch


def forward(x, gamma, beta, eps):
    raise NotImplementedError
