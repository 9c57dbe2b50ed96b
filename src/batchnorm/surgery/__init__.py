"""In-place changes of a model's batch norms: convert and revert, fuse, freeze, modes, copy statistics."""

from batchnorm.surgery.absorb import Absorbed
from batchnorm.surgery.averages import copy_statistics
from batchnorm.surgery.convert import convert
from batchnorm.surgery.exchange import revert, why_left
from batchnorm.surgery.freeze import freeze, unfreeze
from batchnorm.surgery.fuse import fuse
from batchnorm.surgery.modes import training_mode
from batchnorm.surgery.walker import Slot, batch_norms, is_frozen_norm, walk

__all__ = [
    "Absorbed",
    "Slot",
    "batch_norms",
    "convert",
    "copy_statistics",
    "freeze",
    "fuse",
    "is_frozen_norm",
    "revert",
    "training_mode",
    "unfreeze",
    "walk",
    "why_left",
]
