"""Batch normalization for PyTorch. `import batchnorm as bn`."""

from batchnorm import functional, statistics
from batchnorm.errors import BatchNormError
from batchnorm.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.moments import Moments
from batchnorm.surgery import convert, revert

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "convert",
    "functional",
    "revert",
    "statistics",
]
