"""Population statistics: mean and variance over a whole data set, for inference. `recalibration` explains how."""

from batchnorm.population.recalibration import METHODS, Progress, recalibrate, recalibrate_alone, recalibrating

__all__ = ["METHODS", "Progress", "recalibrate", "recalibrate_alone", "recalibrating"]
