"""Where the normalizing statistics come from, as parts a layer is given: `BatchNorm2d(64, statistics=Running())`.

A part is stateless: what it remembers lives in the layer's buffers, but for what a recomputation needs (`recomputed`). Most need torch's
only; those that keep more of them say so (`Kept`), and a checkpoint of any part loads into any other.
"""

from batchnorm.statistics.accumulate import accumulate
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.contract import Applying, Kept, Layer, Statistics, kept_by
from batchnorm.statistics.domains import Domains, domain
from batchnorm.statistics.ghost import Ghost
from batchnorm.statistics.moving_average import MovingAverage
from batchnorm.statistics.one_batch import as_one_batch
from batchnorm.statistics.renorm import Renorm
from batchnorm.statistics.running import Running

__all__ = [
    "Applying",
    "Batch",
    "Domains",
    "Ghost",
    "Kept",
    "Layer",
    "MovingAverage",
    "Renorm",
    "Running",
    "Statistics",
    "accumulate",
    "as_one_batch",
    "domain",
    "kept_by",
]
