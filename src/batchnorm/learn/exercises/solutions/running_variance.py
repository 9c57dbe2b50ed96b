import torch


def update_running_variance(running_var, x, momentum):
    axes = [axis for axis in range(x.dim()) if axis != 1]
    unbiased = torch.var(x, axes, correction=1)
    return (1 - momentum) * running_var + momentum * unbiased
