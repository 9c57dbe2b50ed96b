"""Population statistics: those of a whole data set, for inference. `recalibration` says how they are taken."""

from batchnorm.population.recalibration import METHODS, Progress, recalibrate, recalibrating

__all__ = ["METHODS", "Progress", "recalibrate", "recalibrating"]
