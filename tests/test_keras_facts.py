"""Keras' published semantics of masks and of batch renormalization, as numbers worked out by hand from its formulas.

Keras' momentum weighs the old value: 0.9 there is 0.1 here. Its moving variance follows the biased variance.
"""

import torch

import batchnorm as bn
from batchnorm.statistics import Renorm


def close(value, expected):
    torch.testing.assert_close(value.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def keras_layer(**options):
    return bn.BatchNorm(
        1, eps=0.0009765625, momentum=0.1, channel_axis=-1, dtype=torch.float64, running_variance="biased", **options
    )


def test_a_mask_leaves_padding_out_of_mean_and_variance():
    """Valid values 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5; moving mean 0.1 · 4, moving variance 0.9 · 1 + 0.1 · 5."""
    layer = keras_layer()
    x = torch.tensor([[1.0, 3.0, 100.0], [5.0, -100.0, 7.0]], dtype=torch.float64).unsqueeze(-1)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    y = layer(x, mask=mask)
    sigma = 5.0009765625**0.5
    close(y[mask].flatten(), [-3 / sigma, -1 / sigma, 1 / sigma, 3 / sigma])
    close(layer.running_mean, [0.4])
    close(layer.running_var, [1.4])


def test_an_empty_mask_moves_nothing():
    layer = keras_layer()
    layer(torch.ones(2, 3, 1, dtype=torch.float64), mask=torch.zeros(2, 3, dtype=torch.bool))
    close(layer.running_mean, [0.0])
    close(layer.running_var, [1.0])


def test_renorm_unclipped():
    """Batch -2, 6 over moving mean 0 and variance 1: mean 2, sigma² 16 + eps; r = sigma / sigma_moving, d = 2 / sigma_moving.

    x̂ · r + d = (x - 2) / sigma_moving + 2 / sigma_moving = x / sigma_moving: by the moving statistics, as in inference.
    """
    layer = keras_layer(statistics=Renorm(r_max=100.0, d_max=100.0, warmup=0))
    y = layer(torch.tensor([[-2.0], [6.0]], dtype=torch.float64))
    moving = 1.0009765625**0.5
    close(y.flatten(), [-2 / moving, 6 / moving])
    close(layer.running_mean, [0.2])
    close(layer.running_var, [0.9 + 1.6])


def test_renorm_clipped_on_both_sides():
    """The same batch with r at most 2 and d at most 0.5, then one of deviation 0.03125 about -3, with the lower bounds 1 / 2 and -0.5."""
    part = Renorm(r_max=2.0, d_max=0.5, warmup=0)
    layer = keras_layer(statistics=part)
    y = layer(torch.tensor([[-2.0], [6.0]], dtype=torch.float64))
    sigma = 16.0009765625**0.5
    close(y.flatten(), [-4 / sigma * 2 + 0.5, 4 / sigma * 2 + 0.5])
    layer = keras_layer(statistics=part)
    y = layer(torch.tensor([[-3.03125], [-2.96875]], dtype=torch.float64))
    sigma = (2 * 0.0009765625) ** 0.5  # 0.03125² is the epsilon
    close(y.flatten(), [-0.03125 / sigma / 2 - 0.5, 0.03125 / sigma / 2 - 0.5])


def test_renorm_gives_the_correction_no_gradient():
    """r and d are constants: the two gradients of one output by the two values of a batch are opposite."""
    layer = keras_layer(statistics=Renorm(r_max=2.0, d_max=0.5, warmup=0))
    x = torch.tensor([[-2.0], [6.0]], dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x)[0, 0], x)
    # x̂ of the first is -h / sqrt(h² + eps) with h = 4 half the distance: dx̂/dh = -eps / sigma³, and dh/dx = -1/2, 1/2; times r = 2.
    slope = 0.0009765625 / 16.0009765625**1.5
    torch.testing.assert_close(dx.flatten(), torch.tensor([slope, -slope], dtype=torch.float64), rtol=1e-6, atol=0)
