"""Where the normalizing statistics come from, as parts a layer is given: `BatchNorm2d(64, statistics=Running())`.

A part is stateless: what it remembers lives in the layer's buffers, so that every layer has the state_dict of torch's and a checkpoint
of any part loads into any other.
"""

from batchnorm.statistics.batch import Batch
from batchnorm.statistics.contract import Layer, Statistics
from batchnorm.statistics.ghost import Ghost
from batchnorm.statistics.renorm import Renorm
from batchnorm.statistics.running import Running

__all__ = ["Batch", "Ghost", "Layer", "Renorm", "Running", "Statistics"]
