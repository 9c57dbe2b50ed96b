"""One table of layers for every sweep (tests/test_sweep.py). Adding a layer or an option is adding a row."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
from torch import nn

import batchnorm as bn
from batchnorm.statistics import Domains, Ghost, Mixed, Renorm, Running


@dataclass(frozen=True)
class Row:
    """A layer, the input it takes, and torch's way to say the same (None where torch has none).

    `constants_from_input`: its formula takes numbers from the input that count as constants in the backward, so that the
    gradient is by design not the derivative.
    """

    name: str
    ours: Callable[..., nn.Module]
    shape: tuple[int, ...]
    torchs: Callable[..., nn.Module] | None = None
    constants_from_input: bool = False


# Torch's module of each activation.
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "gelu": nn.GELU(),
}

ROWS = [
    Row("BatchNorm1d", lambda **k: bn.BatchNorm1d(3, **k), (8, 3), lambda **k: nn.BatchNorm1d(3, **k)),
    Row("BatchNorm1d-3d", lambda **k: bn.BatchNorm1d(3, **k), (4, 3, 5), lambda **k: nn.BatchNorm1d(3, **k)),
    Row("BatchNorm2d", lambda **k: bn.BatchNorm2d(3, **k), (4, 3, 5, 2), lambda **k: nn.BatchNorm2d(3, **k)),
    Row("BatchNorm3d", lambda **k: bn.BatchNorm3d(3, **k), (2, 3, 2, 3, 2), lambda **k: nn.BatchNorm3d(3, **k)),
    Row("BatchNorm", lambda **k: bn.BatchNorm(3, **k), (4, 3, 5, 2), lambda **k: nn.BatchNorm2d(3, **k)),
    Row(
        "no-affine",
        lambda **k: bn.BatchNorm2d(3, affine=False, **k),
        (4, 3, 5, 2),
        lambda **k: nn.BatchNorm2d(3, affine=False, **k),
    ),
    Row(
        "no-tracking",
        lambda **k: bn.BatchNorm2d(3, track_running_stats=False, **k),
        (4, 3, 5, 2),
        lambda **k: nn.BatchNorm2d(3, track_running_stats=False, **k),
    ),
    Row(
        "cumulative",
        lambda **k: bn.BatchNorm2d(3, momentum=None, **k),
        (4, 3, 5, 2),
        lambda **k: nn.BatchNorm2d(3, momentum=None, **k),
    ),
    *(
        Row(
            f"relu-like-{name}",
            lambda name=name, **k: bn.BatchNorm2d(3, activation=name, **k),
            (4, 3, 5, 2),
            lambda module=module, **k: nn.Sequential(nn.BatchNorm2d(3, **k), module),
        )
        for name, module in ACTIVATIONS.items()
    ),
    Row("channels-last-axis", lambda **k: bn.BatchNorm(3, channel_axis=-1, **k), (4, 5, 3)),
    Row("biased", lambda **k: bn.BatchNorm2d(3, running_variance="biased", **k), (4, 3, 5, 2)),
    Row("propagating", lambda **k: bn.BatchNorm2d(3, on_nonfinite="propagate", **k), (4, 3, 5, 2)),
    Row("running", lambda **k: bn.BatchNorm2d(3, statistics=Running(), **k), (4, 3, 5, 2)),
    Row("domains", lambda **k: bn.BatchNorm2d(3, statistics=Domains(("real", "fake")), **k), (4, 3, 5, 2)),
    Row("mixed", lambda **k: bn.BatchNorm2d(3, statistics=Mixed(2.0), **k), (4, 3, 5, 2)),
    Row("ghost", lambda **k: bn.BatchNorm2d(3, statistics=Ghost(2), **k), (4, 3, 5, 2)),
    Row("ghost-remainder", lambda **k: bn.BatchNorm1d(3, statistics=Ghost(3), **k), (7, 3)),
    Row("renorm-warming-up", lambda **k: bn.BatchNorm2d(3, statistics=Renorm(), **k), (4, 3, 5, 2)),
    Row(
        "renorm",
        lambda **k: bn.BatchNorm2d(3, statistics=Renorm(warmup=0), **k),
        (4, 3, 5, 2),
        constants_from_input=True,
    ),
]


# Sources without a row, and why.
EXEMPT = {
    "MovingAverage": "its gradient is not a derivative, so most of what is swept raises: tests/test_moving_average.py",
    "TaskNorm": "inference needs an episode: tests/test_meta_learning.py, which runs the sweeps that train",
}

ALIKE = {  # to a compiler or an exporter, one of the other rows
    "BatchNorm1d-3d", "BatchNorm3d", "BatchNorm", "no-bias", "no-affine-no-tracking", "propagating", "ghost-remainder",
    "renorm-at-once", *(f"relu-like-{name}" for name in ACTIVATIONS if name != "relu"),
}  # fmt: skip


def each_kind(rows: Iterable[Row]) -> pytest.MarkDecorator:
    """All rows, for what takes seconds: those that go the way of another one in `make test-all` alone."""
    cases = [pytest.param(row, marks=pytest.mark.slow if row.name in ALIKE else ()) for row in rows]
    return pytest.mark.parametrize("row", cases, ids=lambda row: row.name)
