"""Task 6: the running variance, which is unbiased."""

from torch import Tensor

from batchnorm import reference
from batchnorm.language import marked
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, Variants, judge, normal
from batchnorm.learn.exercises.task import Task

MOMENTUM = 0.3
NAME = "update_running_variance"


def check(learner: Learner) -> None:
    """Samples, and images, where every pixel counts."""
    for seed, shape in enumerate(((4, 3), (2, 3, 2, 2))):
        x, old = 2 * normal(seed, *shape), normal(seed + 10, 3).square() + 1
        (new,) = learner.call(NAME, (old, x, MOMENTUM), (3,))
        _, right = reference.running(old * 0, old, x, MOMENTUM)
        judge(NAME, new, right, variants(old, x))


def variants(old: Tensor, x: Tensor) -> Variants:
    """What the misconceptions give for x (N, C, *S)."""
    values = x.transpose(0, 1).flatten(1)  # (C, N * S)
    biased, unbiased = values.var(1, correction=0), values.var(1)
    N = len(x)

    def averaged(new: Tensor, weight: float = MOMENTUM) -> Tensor:
        return (1 - weight) * old + weight * new

    return {
        why.BIASED_RUNNING_VARIANCE: lambda: averaged(biased),
        why.MOMENTUM_REVERSED: lambda: averaged(unbiased, 1 - MOMENTUM),
        why.NOT_AVERAGED: lambda: unbiased,
        why.OLD_VALUE_KEPT_WHOLE: lambda: old + MOMENTUM * unbiased,
        why.STANDARD_DEVIATION_AVERAGED: lambda: averaged(unbiased.sqrt()),
        why.COUNTED_SAMPLES_ONLY: lambda: averaged(biased * N / (N - 1)),
    }


TASK = Task(
    6,
    "running_variance",
    marked("the running variance is unbiased"),
    (
        marked(
            "Write update_running_variance(running_var, x, momentum): the running variance after one more batch, shape (C,), as PyTorch's "
            "layers compute it. x has shape (N, C) or (N, C, H, W)."
        ),
    ),
    ("update_running_variance",),
    (
        marked(
            "Which variance estimates that of all data: the one divided by m, or by m - 1? And what is m for an image?"
        ),
        marked("In PyTorch momentum is the weight of the new value; the old one keeps 1 - momentum."),
        marked(
            "variance = x.var(every dim but 1) is unbiased; return (1 - momentum) * running_var + momentum * variance."
        ),
    ),
    check,
)
