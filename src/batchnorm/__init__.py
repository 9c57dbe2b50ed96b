"""Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167) for PyTorch. `import batchnorm as bn`."""

from batchnorm import errors, functional, statistics
from batchnorm.distributed import synchronize, unsynchronize
from batchnorm.errors import BatchNormError
from batchnorm.explain import Explanation, explain
from batchnorm.functional import recomputation
from batchnorm.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.moments import Moments
from batchnorm.statistics import accumulate, domain
from batchnorm.surgery import convert, copy_statistics, freeze, revert, unfreeze
from batchnorm.version import __version__

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "Explanation",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "__version__",
    "accumulate",
    "convert",
    "copy_statistics",
    "domain",
    "errors",
    "explain",
    "freeze",
    "functional",
    "recomputation",
    "revert",
    "statistics",
    "synchronize",
    "unfreeze",
    "unsynchronize",
]
