"""Task 9: a batch norm folded into the linear layer before it."""

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.language import marked
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, Variants, judge, normal
from batchnorm.learn.exercises.task import Task

EPS = 0.1


def check(learner: Learner) -> None:
    """The folded layer must give what the two layers give in inference; on a square weight wrong axes go unnoticed."""
    for seed, (outputs, inputs) in enumerate(((3, 3), (2, 4))):
        weight, bias = normal(seed, outputs, inputs), normal(seed + 10, outputs)
        gamma, beta = normal(seed + 20, outputs), normal(seed + 30, outputs)
        mean, variance = normal(seed + 40, outputs), normal(seed + 50, outputs).square() + 0.5
        given = (weight, bias, gamma, beta, mean, variance)
        found = learner.call("fold", (*given, EPS), (outputs, inputs), (outputs,))
        x = torch.cat([torch.eye(inputs).double(), torch.zeros(1, inputs).double()])  # each weight, and the bias
        right = reference.inference(x @ weight.T + bias, mean, variance, gamma, beta, EPS)
        folded_bias = right[-1]
        judge("weight", found[0], (right[:-1] - folded_bias).T, _of_weight(weight, gamma, variance))
        judge("bias", found[1], folded_bias, _of_bias(bias, gamma, beta, mean, variance))


def _of_weight(weight: Tensor, gamma: Tensor, variance: Tensor) -> Variants:
    scale = gamma / (variance + EPS).sqrt()
    return {
        why.SCALED_COLUMNS: lambda: weight * scale,
        why.VARIANCE_FOR_ROOT: lambda: weight * (gamma / (variance + EPS))[:, None],
        why.EPSILON_OUTSIDE: lambda: weight * (gamma / (variance.sqrt() + EPS))[:, None],
        why.EPSILON_FORGOTTEN: lambda: weight * (gamma / variance.sqrt())[:, None],
        why.GAMMA_FORGOTTEN: lambda: weight / (variance + EPS).sqrt()[:, None],
    }


def _of_bias(bias: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> Variants:
    scale = gamma / (variance + EPS).sqrt()
    return {
        why.BIAS_NOT_SCALED: lambda: bias - mean * scale + beta,
        why.MEAN_NOT_FOLDED: lambda: bias * scale + beta,
        why.BETA_SCALED: lambda: (bias - mean + beta) * scale,
        why.OLD_BIAS_LOST: lambda: beta - mean * scale,
        why.BETA_FORGOTTEN: lambda: (bias - mean) * scale,
    }


TASK = Task(
    9,
    "fold",
    marked("fold a batch norm into a linear layer"),
    (
        marked(
            "In inference a batch norm after a linear layer is an affine function of its output, so one linear layer can compute both. "
            "Write fold(weight, bias, gamma, beta, running_mean, running_var, eps) that returns the tuple weight (out, in), bias (out,) of "
            "this layer. The given weight has shape (out, in), everything else shape (out,)."
        ),
    ),
    ("fold",),
    (
        marked("Write y = γ (Wx + b - µ) / √(σ² + ε) + β, and sort by x."),
        marked("With scale = γ / √(σ² + ε): y = (scale · W) x + (b - µ) · scale + β."),
        marked("An output is a row of W: weight * scale[:, None]."),
    ),
    check,
)
