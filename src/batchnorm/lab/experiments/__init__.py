"""The experiments, one file each: question, data, networks, measurements, and the source of the claim.

`NAMES` is the order of lists and of the report. The experiment `a-b.c` is `EXPERIMENT` in the module `a_b_c` of this folder, imported
on demand.
"""

from importlib import import_module

from batchnorm.errors import InputError
from batchnorm.lab.experiment import Experiment

NAMES = (
    "demo",
    "lr-range",
    "paper-4.1",
    "depth",
    "image-classification",
    "smoothness",
    "regularization",
    "detection",
    "speech",
    "gan",
    "dqn",
    "policy-gradient",
    "recommender",
    "translation",
    "driving",
    "batch-size",
    "alternatives",
    "population",
    "corruption",
    "federated",
    "cost",
)

FIRST = ("demo", "lr-range", "depth")  # good to start with: short, with a large effect


def module_of(name: str) -> str:
    """The module of the experiment with this name."""
    return f"{__name__}.{name.replace('-', '_').replace('.', '_')}"


def load(name: str) -> Experiment:
    """
    Load the experiment with this name.

    Raises:
        InputError: there is none.
    """
    if name not in NAMES:
        raise InputError(f"there is no experiment {name}; there are {', '.join(NAMES)}")
    return import_module(module_of(name)).EXPERIMENT
