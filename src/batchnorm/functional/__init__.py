"""Batch normalization as functions. `normalization` has those that compute, and says which way a call takes."""

from batchnorm.functional.checks import check_input, check_residual, check_several_values, is_single_value, mask_of
from batchnorm.functional.normalization import batch_norm, moments, normalize, normalize_with
from batchnorm.functional.recompute import recomputation, recomputing
from batchnorm.functional.reduction import Reducer
from batchnorm.functional.running import counter_on, update_running_statistics

__all__ = [
    "Reducer",
    "batch_norm",
    "check_input",
    "check_residual",
    "check_several_values",
    "counter_on",
    "is_single_value",
    "mask_of",
    "moments",
    "normalize",
    "normalize_with",
    "recomputation",
    "recomputing",
    "update_running_statistics",
]
