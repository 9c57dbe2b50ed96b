"""Task 8: what a layer gives in training, and in evaluation after that."""

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.language import marked
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, judge
from batchnorm.learn.exercises.task import Task

BATCH = torch.tensor([[4.0], [6.0], [8.0], [10.0]], dtype=torch.float64)
MOMENTUM = 0.1
TWO_DECIMALS = 0.006


def check(learner: Learner) -> None:
    """The predictions in the order of the statement."""
    sample = BATCH[-1:]
    zero, one = torch.zeros(1).double(), torch.ones(1).double()
    mean, variance = reference.running(zero, one, BATCH, MOMENTUM)
    biased = reference.running(zero, one, BATCH, MOMENTUM, unbiased=False)[1]
    keras = reference.running(zero, one, BATCH, 1 - MOMENTUM)
    deviation, batch_variance, population = BATCH[-1, 0] - BATCH.mean(), BATCH.var(correction=0), BATCH.var()
    training, evaluation, after_many = (
        deviation / batch_variance.sqrt(),
        reference.inference(sample, mean, variance).squeeze(),
        deviation / population.sqrt(),
    )
    by_batch = {why.VARIANCE_FOR_ROOT: deviation / batch_variance, why.UNBIASED_IN_NORMALIZATION: after_many}
    _compare(learner, "IN_TRAINING", training, by_batch)
    reverse = {why.MOMENTUM_REVERSED: keras[0][0], why.NOT_AVERAGED: BATCH.mean()}
    _compare(learner, "RUNNING_MEAN", mean[0], reverse)
    _compare(
        learner,
        "RUNNING_VARIANCE",
        variance[0],
        {
            why.BIASED_RUNNING_VARIANCE: biased[0],
            why.MOMENTUM_REVERSED: keras[1][0],
            why.NOT_AVERAGED: population,
            why.OLD_VALUE_KEPT_WHOLE: 1 + MOMENTUM * population,
        },
    )
    _compare(
        learner,
        "IN_EVALUATION",
        evaluation,
        {
            why.EVALUATED_BY_BATCH: training,
            why.EVALUATED_BY_TRUTH: after_many,
            why.VARIANCE_FOR_ROOT: (sample[0, 0] - mean[0]) / variance[0],
            why.NOT_CENTERED: sample[0, 0] / variance[0].sqrt(),
        },
    )
    same = {why.UNBIASED_AFTER_MANY: training, why.VARIANCE_FOR_ROOT: deviation / population}
    _compare(learner, "AFTER_MANY", after_many, same)


def _compare(learner: Learner, name: str, right: Tensor, variants: dict[str, Tensor]) -> None:
    found = learner.numbers(name)
    judge(name, found, right, {each: lambda value=value: value for each, value in variants.items()}, TWO_DECIMALS)


TASK = Task(
    8,
    "predict",
    marked("predict how training and evaluation differ"),
    (
        marked(
            "A new nn.BatchNorm1d(1) (momentum 0.1, running mean 0, running variance 1) gets the batch 4, 6, 8, 10 in training mode. "
            "Predict to two decimals, with eps taken as 0: the output for the sample 10; the running mean and the running variance after "
            "this one batch; the output for the sample 10 after eval(); and the output for it in eval() if the layer had seen "
            "this same batch a thousand times."
        ),
    ),
    ("IN_TRAINING", "RUNNING_MEAN", "RUNNING_VARIANCE", "IN_EVALUATION", "AFTER_MANY"),
    (
        marked(
            "In training the batch's mean and biased variance normalize: 7 and 5. In evaluation the running statistics do."
        ),
        marked(
            "One batch moves the running statistics a tenth of the way: from 0 towards 7, and from 1 towards the unbiased 20/3."
        ),
        marked(
            "IN_EVALUATION = (10 - RUNNING_MEAN) / √RUNNING_VARIANCE. After a thousand batches these are 7 and 20/3."
        ),
    ),
    check,
)
