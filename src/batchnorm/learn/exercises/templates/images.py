import torch


def forward_images(x, gamma, beta, eps):
    raise NotImplementedError
