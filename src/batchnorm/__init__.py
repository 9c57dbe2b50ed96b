"""Batch normalization (Ioffe & Szegedy 2015, arXiv:1502.03167) for PyTorch. `import batchnorm as bn`."""

from batchnorm import errors, functional, interop, statistics
from batchnorm.agreement import Agreement, average_buffers, replicas_agree
from batchnorm.distributed import synchronize, unsynchronize
from batchnorm.errors import BatchNormError
from batchnorm.explain import Explanation, explain
from batchnorm.folding import FoldReport, fold
from batchnorm.functional import recomputation
from batchnorm.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.memory import save_memory
from batchnorm.moments import Moments
from batchnorm.population import recalibrate
from batchnorm.statistics import accumulate, as_one_batch, domain
from batchnorm.surgery import convert, copy_statistics, freeze, fuse, revert, unfreeze
from batchnorm.version import __version__

__all__ = [
    "Agreement",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "Explanation",
    "FoldReport",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "__version__",
    "accumulate",
    "as_one_batch",
    "average_buffers",
    "convert",
    "copy_statistics",
    "domain",
    "errors",
    "explain",
    "fold",
    "freeze",
    "functional",
    "fuse",
    "interop",
    "recalibrate",
    "recomputation",
    "replicas_agree",
    "revert",
    "save_memory",
    "statistics",
    "synchronize",
    "unfreeze",
    "unsynchronize",
]
