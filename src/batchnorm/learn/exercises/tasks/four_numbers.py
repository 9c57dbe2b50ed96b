"""Task 1: the forward of four numbers by hand."""

import torch
from torch import Tensor

from batchnorm.language import marked
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, judge
from batchnorm.learn.exercises.task import Task
from batchnorm.reference import forward

VALUES = torch.tensor([0.8, 1.2, 0.9, 1.1], dtype=torch.float64)
GAMMA, BETA = 0.5, 2.0
TWO_DECIMALS = 0.006


def check(learner: Learner) -> None:
    """Each number in the order in which it is computed."""
    right = forward(VALUES[:, None], torch.tensor([GAMMA]), torch.tensor([BETA]))
    mean, variance, normalized, y = (each.flatten() for each in (right.mean, right.variance, right.xhat, right.y))
    deviation = VALUES - mean
    _compare(learner, "MEAN", mean[0], {why.SUM_FOR_MEAN: VALUES.sum()})
    _compare(
        learner,
        "VARIANCE",
        variance[0],
        {
            why.UNBIASED_IN_NORMALIZATION: VALUES.var(),
            why.ROOT_FOR_VARIANCE: variance[0].sqrt(),
            why.SUM_FOR_VARIANCE: deviation.square().sum(),
        },
        0.001,
    )
    tutorials = deviation / 0.1
    _compare(
        learner,
        "NORMALIZED",
        normalized,
        {
            why.TUTORIALS_NUMBERS: tutorials,
            why.VARIANCE_FOR_ROOT: deviation / variance,
            why.UNBIASED_IN_NORMALIZATION: deviation / VALUES.std(),
            why.NOT_CENTERED: VALUES / variance.sqrt(),
            why.SIGN: -normalized,
        },
    )
    _compare(
        learner,
        "OUTPUT",
        y,
        {
            why.TUTORIALS_NUMBERS: GAMMA * tutorials + BETA,
            why.BETA_FORGOTTEN: GAMMA * normalized,
            why.GAMMA_FORGOTTEN: normalized + BETA,
            why.GAMMA_AND_BETA_EXCHANGED: BETA * normalized + GAMMA,
        },
    )


def _compare(
    learner: Learner, name: str, right: Tensor, variants: dict[str, Tensor], close: float = TWO_DECIMALS
) -> None:
    found = learner.numbers(name, tuple(right.shape))
    judge(name, found, right, {each: lambda value=value: value for each, value in variants.items()}, close)


TASK = Task(
    1,
    "four_numbers",
    marked("the forward of four numbers by hand"),
    (
        marked(
            "A mini-batch of one channel is 0.8, 1.2, 0.9, 1.1. Compute its mean, its variance, the four normalized values, and the output "
            "for gamma 0.5 and beta 2, by hand, to two decimals (the variance to three)."
        ),
    ),
    ("MEAN", "VARIANCE", "NORMALIZED", "OUTPUT"),
    (
        marked("Write down the four deviations from the mean first. Their sum is 0."),
        marked("The variance is the mean of the squared deviations, 0.1 / 4. Its root is what you divide by."),
        marked(
            "√0.025 = 0.158, so the first normalized value is -0.2 / 0.158. `batchnorm explain 0.8 1.2 0.9 1.1` shows all steps."
        ),
    ),
    check,
)
