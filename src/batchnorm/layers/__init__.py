"""The layers: torch's constructors, checks, attributes and state_dict, with our statistics sources, kernels and options.

`layer` computes, `state` holds buffers and reads checkpoints, `nested` takes nested tensors, `lazy` waits for the first input.
"""

from batchnorm.layers.layer import (
    OPTIONS,
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    check_statistics,
    with_signature_of,
)
from batchnorm.layers.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from batchnorm.layers.state import STATISTICS

__all__ = [
    "OPTIONS",
    "STATISTICS",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "check_statistics",
    "with_signature_of",
]

# A pickled model names the room, so that it is read again wherever in it a class stands.
for _layer in (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d):
    _layer.__module__ = __name__
