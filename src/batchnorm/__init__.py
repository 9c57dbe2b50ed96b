"""Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167) for PyTorch. `import batchnorm as bn`."""

from batchnorm import errors, functional, statistics
from batchnorm.errors import BatchNormError
from batchnorm.explain import Explanation, explain
from batchnorm.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.moments import Moments
from batchnorm.surgery import convert, revert

__version__ = "0.1.0"

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
    "convert",
    "errors",
    "explain",
    "functional",
    "revert",
    "statistics",
]
