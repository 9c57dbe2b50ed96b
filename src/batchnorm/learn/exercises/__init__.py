"""Ten exercises whose checks name what is misunderstood: `batchnorm learn start`, `batchnorm learn check`, and notebooks."""

from batchnorm.learn.exercises.check import check

__all__ = ["check"]
