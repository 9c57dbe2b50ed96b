import torch


def fold(weight, bias, gamma, beta, running_mean, running_var, eps):
    raise NotImplementedError
