"""Task 7: how many batches the running statistics need."""

from math import ceil, floor, log

from batchnorm.language import marked, tr
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, Wrong
from batchnorm.learn.exercises.task import Task

CASES = ((0.1, 0.9), (0.01, 0.9), (0.3, 0.75), (0.5, 0.99))


def batches(momentum: float, share: float) -> int:
    """The number of batches after which the old value weighs at most 1 - share."""
    count, old = 0, 1.0
    while old > 1 - share:
        count, old = count + 1, old * (1 - momentum)
    return count


def check(learner: Learner) -> None:
    """Several momenta, so that no number passes by chance."""
    for momentum, share in CASES:
        (value,) = learner.call("batches", (momentum, share), ())
        found, right = float(value), batches(momentum, share)
        if found == right:
            continue
        for misconception, wrong in variants(momentum, share).items():
            if abs(found - wrong) < 1e-6:
                raise Wrong(tr(misconception))
        call = f"batches({momentum:g}, {share:g})"
        raise Wrong(tr("{name} is {found}; it must be {right}", name=call, found=f"{found:g}", right=right))


def variants(momentum: float, share: float) -> dict[str, float]:
    """What the misconceptions give; the rounded ones come last, since they are the least telling."""
    exact = log(1 - share) / log(1 - momentum)
    keras = log(1 - share) / log(momentum)
    old = log(share) / log(1 - momentum)
    return {
        why.NOT_ROUNDED: exact,
        why.ONE_BATCH_SHORT: floor(exact),
        why.TIME_CONSTANT: round(1 / momentum),
        why.STEPS_LIKE_A_LINE: ceil(round(share / momentum, 9)),
        why.MOMENTUM_REVERSED: ceil(keras),
        why.SHARE_OF_THE_OLD: ceil(old),
    }


TASK = Task(
    7,
    "momentum",
    marked("momentum: how many batches to 90 %"),
    (
        marked(
            "A running mean starts at 0, and every batch has the mean 1. After every batch it moves by the momentum (PyTorch's "
            "convention). Write batches(momentum, share): after how many batches has it reached this share of the way? batches(0.1, 0.9) "
            "is the answer for PyTorch's default and 90 %."
        ),
    ),
    ("batches",),
    (
        marked("Follow the distance to the goal instead of the value: what does one batch do to it?"),
        marked("The distance is multiplied by 1 - momentum every time. When is (1 - momentum)ⁿ at most 1 - share?"),
        marked("n = log(1 - share) / log(1 - momentum), rounded up; or count in a loop."),
    ),
    check,
)
