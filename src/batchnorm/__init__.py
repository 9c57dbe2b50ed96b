"""Batch normalization for PyTorch. `import batchnorm as bn`."""

from batchnorm import functional

__all__ = ["functional"]
