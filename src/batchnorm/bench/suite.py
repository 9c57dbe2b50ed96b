"""Suites: the batch norms of a network, read from data files."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from batchnorm import kernels
from batchnorm.errors import InputError

THROUGH = ("function", "layer", "replicas")


@dataclass(frozen=True)
class Layer:
    """Batch norms of a network with the same shape and epilogue.

    Attributes:
        shape: (N, C, *S).
        count: number of such layers in the network.
        activation: the activation that follows, or None.
        residual: whether a residual is added before the activation.
    """

    shape: tuple[int, ...]
    count: int = 1
    activation: str | None = None
    residual: bool = False


@dataclass(frozen=True)
class Suite:
    """The batch norms of one network.

    Attributes:
        name: the name of the network.
        source: the paper, and the table in it.
        layers: the different layers.
        through: "function" times the functions; "layer" whole layers with their overhead; "replicas" layers in two processes,
            synchronized and not.
        directions, dtypes, providers: what to measure if the command does not say; empty for the usual.
    """

    name: str
    source: str
    layers: tuple[Layer, ...]
    through: str = "function"
    directions: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()


def names() -> list[str]:
    """The suites that come with the library."""
    files = resources.files("batchnorm.bench").joinpath("shapes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load(suite: str) -> Suite:
    """A suite by its name, or by the path of a TOML file.

    Raises:
        InputError: there is no suite with this name, or the file is not a suite.
    """
    if suite in names():
        file = resources.files("batchnorm.bench").joinpath("shapes", f"{suite}.toml")
    elif suite.endswith(".toml"):
        file = Path(suite)
    else:
        raise InputError(f"suite must be one of {', '.join(names())}, or the path of a .toml file, but got {suite!r}")
    try:
        return _parse(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(
            f"{suite} must be a suite with name, source, batch and layers, each with a shape: {reason}"
        ) from error


def _parse(data: dict[str, Any]) -> Suite:
    unknown = data.keys() - {field.name for field in fields(Suite)} - {"batch", "of"}
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}")
    of = [layer for other in data.get("of", ()) for layer in load(other).layers]
    own = [_layer(row, data["batch"]) for row in (data.get("layers", ()) if of else data["layers"])]
    layers = tuple(dict.fromkeys([*of, *own]))
    if not layers:
        raise ValueError("layers is empty")
    through = data.get("through", "function")
    if through not in THROUGH:
        raise ValueError(f"through must be one of {', '.join(THROUGH)}, but is {through!r}")
    defaults = (tuple(map(str, data.get(name, ()))) for name in ("directions", "dtypes", "providers"))
    return Suite(str(data["name"]), str(data["source"]), layers, through, *defaults)


def _layer(row: dict[str, Any], batch: int) -> Layer:
    shape = (row.pop("batch", batch), *row.pop("shape"))
    layer = Layer(shape, **row)
    sizes = (*shape, layer.count)
    if not 2 <= len(shape) <= 5 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(
            f"shape must be C and up to three sizes, all sizes and counts positive integers, but got {sizes}"
        )
    kernels.parse(layer.activation)
    return layer
