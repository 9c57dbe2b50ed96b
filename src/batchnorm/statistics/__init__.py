"""Statistics sources: a layer normalizes by the statistics that its source provides, as in `BatchNorm2d(64, statistics=Running())`.

A source has no state of its own: its state is in the layer's buffers, except what a recomputation needs (`recomputed`). Most sources need
only torch's buffers; the others declare theirs (`SourceBuffer`). A checkpoint of a layer with any source loads into a layer with any other.
"""

from batchnorm.statistics.accumulate import accumulate
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.contract import Applying, Layer, SourceBuffer, Statistics, buffers_of
from batchnorm.statistics.domains import Domains, domain
from batchnorm.statistics.ghost import Ghost
from batchnorm.statistics.mixed import Mixed
from batchnorm.statistics.moving_average import MovingAverage
from batchnorm.statistics.one_batch import as_one_batch
from batchnorm.statistics.renorm import Renorm
from batchnorm.statistics.running import Running

__all__ = [
    "Applying",
    "Batch",
    "Domains",
    "Ghost",
    "Layer",
    "Mixed",
    "MovingAverage",
    "Renorm",
    "Running",
    "SourceBuffer",
    "Statistics",
    "accumulate",
    "as_one_batch",
    "buffers_of",
    "domain",
]
