"""Statistics sources: a layer normalizes by the statistics that its source provides, as in `BatchNorm2d(64, statistics=Running())`.

A source has no state of its own: its state is in the layer's buffers, except what a recomputation needs (`recomputed`). Most sources need
only torch's buffers; the others declare theirs (`SourceBuffer`), and what they learn (`SourceParameter`). A checkpoint of a layer with any
source loads into a layer with any other.
"""

from batchnorm.statistics.accumulate import accumulate
from batchnorm.statistics.batch import Batch
from batchnorm.statistics.contract import (
    Applying,
    Layer,
    SourceBuffer,
    SourceParameter,
    Statistics,
    buffers_of,
    parameters_of,
)
from batchnorm.statistics.domains import Domains, domain
from batchnorm.statistics.episode import Episode
from batchnorm.statistics.ghost import Ghost
from batchnorm.statistics.mixed import Mixed
from batchnorm.statistics.moving_average import MovingAverage
from batchnorm.statistics.one_batch import as_one_batch
from batchnorm.statistics.renorm import Renorm
from batchnorm.statistics.running import Running
from batchnorm.statistics.task_norm import TaskNorm

__all__ = [
    "Applying",
    "Batch",
    "Domains",
    "Episode",
    "Ghost",
    "Layer",
    "Mixed",
    "MovingAverage",
    "Renorm",
    "Running",
    "SourceBuffer",
    "SourceParameter",
    "Statistics",
    "TaskNorm",
    "accumulate",
    "as_one_batch",
    "buffers_of",
    "domain",
    "parameters_of",
]
