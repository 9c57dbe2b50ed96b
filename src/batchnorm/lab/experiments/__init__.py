"""One file per question: what is asked, of which data and networks, what is measured, and who claimed the answer.

`NAMES` is the order of lists and of the report. The experiment `a-b.c` is `EXPERIMENT` in the module `a_b_c` of this folder, imported
when asked for. `learning_rates` is the demonstration's, with a grid and a result of its own.
"""

from importlib import import_module

from batchnorm.errors import InputError
from batchnorm.lab.experiment import Experiment

NAMES = (
    "lr-range",
    "paper-4.1",
    "depth",
    "image-classification",
    "batch-size",
    "population",
    "smoothness",
    "regularization",
    "cost",
    "detection",
    "speech",
    "gan",
    "dqn",
    "policy-gradient",
    "recommender",
    "translation",
    "driving",
)

FIRST = ("lr-range", "depth")  # where to begin: short, and the effect is large


def module_of(name: str) -> str:
    """The module that holds the experiment of this name."""
    return f"{__name__}.{name.replace('-', '_').replace('.', '_')}"


def load(name: str) -> Experiment:
    """
    The experiment of this name.

    Raises:
        InputError: there is none.
    """
    if name not in NAMES:
        raise InputError(f"there is no experiment {name}; there are {', '.join(NAMES)}")
    return import_module(module_of(name)).EXPERIMENT
