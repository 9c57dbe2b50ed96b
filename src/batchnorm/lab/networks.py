"""The networks of the experiments, each with and without batch normalization."""

from torch import nn

from batchnorm.layers import BatchNorm1d


def tutorial_network(batch_norm: bool) -> nn.Sequential:
    """
    The tutorial's 784-512-256-10 network: (N, 1, 28, 28) images to (N, 10) scores.

    After the same `torch.manual_seed` both kinds start from the same weights: the linear layers keep their biases
    under batch normalization, which costs nothing in accuracy (beta takes over) and keeps the random draws equal.
    """

    def hidden(inputs: int, outputs: int) -> list[nn.Module]:
        normalization: list[nn.Module] = [BatchNorm1d(outputs)] if batch_norm else []
        return [nn.Linear(inputs, outputs), *normalization, nn.ReLU()]

    return nn.Sequential(nn.Flatten(), *hidden(784, 512), *hidden(512, 256), nn.Linear(256, 10))
