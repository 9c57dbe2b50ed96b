"""Task 5: the forward of images (N, C, H, W)."""

from torch import Tensor

from batchnorm import reference
from batchnorm.language import marked
from batchnorm.learn.exercises import misconceptions as why
from batchnorm.learn.exercises.learner import Learner, Variants, judge, normal
from batchnorm.learn.exercises.task import Task

EPS = 0.1


def check(learner: Learner) -> None:
    """On a shape whose width is its number of channels, wrong broadcasting goes unnoticed by torch."""
    for seed, shape in enumerate(((3, 2, 4, 2), (2, 3, 2, 5))):
        C = shape[1]
        x, gamma, beta = 2 * normal(seed, *shape) + 1, normal(seed + 10, C), normal(seed + 20, C)
        (y,) = learner.call("forward_images", (x, gamma, beta, EPS), shape)
        judge("forward_images", y, reference.forward(x, gamma, beta, EPS).y, variants(x, gamma, beta))


def variants(x: Tensor, gamma: Tensor, beta: Tensor) -> Variants:
    """What the misconceptions give for x (N, C, H, W)."""

    def normalized(axes: tuple[int, ...], correction: int = 0) -> Tensor:
        variance = x.var(axes, correction=correction, keepdim=True)
        return (x - x.mean(axes, keepdim=True)) / (variance + EPS).sqrt()

    def affine(xhat: Tensor) -> Tensor:
        return gamma[:, None, None] * xhat + beta[:, None, None]

    deviation = x - x.mean((0, 2, 3), keepdim=True)
    variance = x.var((0, 2, 3), correction=0, keepdim=True)
    return {
        why.MEAN_OVER_BATCH_ONLY: lambda: affine(normalized((0,))),
        why.MEAN_OVER_PIXELS_ONLY: lambda: affine(normalized((2, 3))),
        why.MEAN_OF_A_SAMPLE: lambda: affine(normalized((1, 2, 3))),
        why.ONE_MEAN_FOR_ALL: lambda: affine(normalized((0, 1, 2, 3))),
        why.GAMMA_ALONG_WIDTH: lambda: gamma * normalized((0, 2, 3)) + beta,
        why.STATISTICS_ALONG_WIDTH: lambda: affine(
            (x - x.mean((0, 2, 3))) / (x.var((0, 2, 3), correction=0) + EPS).sqrt()
        ),
        why.UNBIASED_IN_NORMALIZATION: lambda: affine(normalized((0, 2, 3), 1)),
        why.EPSILON_OUTSIDE: lambda: affine(deviation / (variance.sqrt() + EPS)),
        why.VARIANCE_FOR_ROOT: lambda: affine(deviation / (variance + EPS)),
    }


TASK = Task(
    5,
    "images",
    marked("the forward of images (N, C, H, W)"),
    (
        marked(
            "Write forward_images(x, gamma, beta, eps) for x of shape (N, C, H, W), gamma and beta of shape (C,). Return y of shape "
            "(N, C, H, W)."
        ),
    ),
    ("forward_images",),
    (
        marked(
            "A convolution uses the same weights at every pixel. So how many values does a channel have in a mini-batch?"
        ),
        marked(
            "Average over dims 0, 2 and 3, and keep them (keepdim=True), so that the statistics have the shape (1, C, 1, 1)."
        ),
        marked("gamma has shape (C,): gamma.reshape(1, -1, 1, 1) lines it up with the channels."),
    ),
    check,
)
