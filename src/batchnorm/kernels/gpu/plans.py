"""Which plan computes a call, and how it cuts x: the table `plans.toml`, read once."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEAST = "BATCHNORM_GPU_BYTES"  # in the environment: `bytes_below`, instead of the table's number
_INT32 = 2**31


@dataclass(frozen=True)
class Plan:
    """A row of the table; `plans.toml` says what the fields mean."""

    name: str
    way: str
    why: str
    layout: str | None = None
    dtypes: tuple[str, ...] = tuple(DTYPES)
    bytes_below: int | None = None
    per_channel: int | None = None
    channels: int = 0
    rows: int = 0
    unit_below: int | None = None
    unit_of_channels: int = 1
    flat: bool = False
    tile: int = 4096
    widest: int = 64
    chain: int = 32
    programs: int = 1
    warps: int = 8
    stages: int = 1
    backward_stages: int = 2

    def fits(self, shape: Shape) -> bool:
        per_channel = shape.rows * shape.positions
        values = per_channel * shape.channels
        held = shape.padded if self.way == "in_registers" else per_channel
        return (
            self.layout in (None, "planar" if shape.planar else "interleaved")
            and shape.dtype in self.dtypes
            and (self.bytes_below is None or values * DTYPES[shape.dtype].itemsize < self.bytes_below)
            and (self.per_channel is None or held <= self.per_channel)
            and shape.channels >= self.channels
            and shape.channels % self.unit_of_channels == 0
            and shape.rows >= self.rows
            and (self.unit_below is None or shape.unit < self.unit_below)
        )


@dataclass(frozen=True)
class Shape:
    """x as the programs see it: planar (rows, channels, positions), flat (rows, channels · positions) or interleaved (rows, channels)."""

    dtype: str
    planar: bool
    rows: int
    channels: int
    positions: int
    flat: bool = False

    @property
    def layout(self) -> str:
        """Of `programs/tiles.py`."""
        return "flat" if self.flat else "planar" if self.planar else "interleaved"

    @property
    def columns(self) -> int:
        """Values of a channel side by side in a row of x, where tiles are cut across them."""
        return self.positions if self.flat else 1

    @property
    def unit(self) -> int:
        """The largest power of two up to 16 that divides the size of a plane, or the number of channels."""
        innermost = self.positions if self.planar else self.channels
        return min(innermost & -innermost, 16)

    @property
    def padded(self) -> int:
        """Values of a channel in a tile that holds them all: its sides are powers of two."""
        return _power_of_two(self.rows) * _power_of_two(self.positions)


@dataclass(frozen=True)
class Cut:
    """How a plan cuts a shape; `programs/tiles.py` says what the fields mean."""

    plan: Plan
    shape: Shape
    height: int
    width: int

    @cached_property
    def name(self) -> str:
        """Plan and dtype, as `trust` and its messages know them."""
        return f"{self.plan.name}, {self.shape.dtype}"

    @cached_property
    def verbs(self) -> str:
        """Its name where the verbs are launched one by one, with statistics from elsewhere between them."""
        return f"{self.name}, verb by verb"

    @cached_property
    def unit(self) -> int:
        return self.shape.unit

    @cached_property
    def even(self) -> bool:
        """Whether no tile has missing columns."""
        shape = self.shape
        return (shape.positions if shape.planar else shape.channels * self.columns) % self.width == 0

    @cached_property
    def columns(self) -> int:
        """Sums of a channel in a piece."""
        return self.shape.columns

    @cached_property
    def sums(self) -> int:
        """Sums of all pieces, each of as many values as a program finds."""
        return self.pieces * self.shape.channels * self.columns

    @cached_property
    def blocks(self) -> int:
        """Programs beside each other: channels, or blocks of `width` channels or columns."""
        return self.shape.channels if self.shape.planar else _ceil(self.shape.channels * self.columns, self.width)

    @cached_property
    def tiles(self) -> int:
        """Tiles of a channel or of a block."""
        across = _ceil(self.shape.positions, self.width) if self.shape.planar else 1
        return _ceil(self.shape.rows, self.height) * across

    @cached_property
    def pieces(self) -> int:
        """Pieces of a channel or of a block. They depend on the shape alone, not on the device: so do the bits of the result."""
        plan = self.plan
        if plan.way != "split":
            return 1
        return max(1, min(self.tiles, max(plan.programs // self.blocks, _ceil(self.tiles, plan.chain))))

    @cached_property
    def backward(self) -> Cut:
        """The cut of the backward, which holds three tensors where the forward holds one: tiles of a channel instead of all of it."""
        plan = self.plan
        if plan.way == "in_registers":
            plan = replace(plan, way="whole", tile=plan.tile // 4, widest=min(plan.widest, 1024), chain=4 * plan.tile)
            return cut_by(replace(plan, stages=plan.backward_stages), self.shape)
        return replace(self, plan=replace(plan, stages=plan.backward_stages))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Arguments of every program; one of them is in units."""
        rows, channels, positions = self.shape.rows, self.shape.channels, self.shape.positions
        if self.shape.planar:
            return {"rows": rows, "channels": channels, "positions": positions // self.unit}
        return {"rows": rows, "channels": channels // self.unit, "positions": positions}

    @cached_property
    def tile(self) -> dict[str, Any]:
        """Constants of every program, and its warps."""
        constants = {"LAYOUT": self.shape.layout, "UNIT": self.unit, "BR": self.height, "BK": self.width}
        return {**self.sizes, **constants, "num_warps": self.plan.warps}

    @cached_property
    def map(self) -> dict[str, Any]:
        """Arguments of a map over pieces."""
        return {**self.tile, "pieces": self.pieces, "tiles": self.tiles, "blocks": self.blocks}

    @cached_property
    def sum(self) -> dict[str, Any]:
        """Arguments of sums over pieces."""
        return {**self.map, "EVEN": self.even, "STAGES": self.plan.stages}

    @cached_property
    def channel(self) -> dict[str, Any]:
        """Arguments of a program that has a channel for itself."""
        return {**self.tile, "tiles": self.tiles, "EVEN": self.even, "STAGES": self.plan.stages}

    @cached_property
    def grid(self) -> tuple[int]:
        return (self.blocks * self.pieces,)

    @cached_property
    def beyond(self) -> str | None:
        """What of it the programs cannot address, or None: offsets in a tile are of 32 bits, those of tiles of 64."""
        shape = self.shape
        if max(shape.rows + self.height, shape.positions + self.width, shape.channels * self.columns) >= _INT32:
            return "it has 2^31 rows or columns, or nearly so many"
        if self.height * shape.channels * shape.positions >= _INT32:
            return "a tile spans 2^31 values or more"
        if max(self.tiles, self.blocks * self.pieces, self.columns * self.pieces) >= _INT32:
            return "it has 2^31 tiles or more"
        if self.plan.way != "split" and self.tiles > self.plan.chain:
            return f"a channel has more than {self.plan.chain} tiles"
        return None


def read() -> tuple[Plan, ...]:
    """The rows of `plans.toml`, with the least number of bytes that the environment asks for."""
    import tomllib  # here, since it compiles the expressions of its grammar, and few programs use a GPU

    rows = tomllib.loads(Path(__file__).with_name("plans.toml").read_text(encoding="utf-8"))["plan"]
    found = tuple(Plan(**{**row, "dtypes": tuple(row.get("dtypes", DTYPES))}) for row in rows)
    least = os.environ.get(LEAST)
    if least is None:
        return found
    return tuple(plan if plan.bytes_below is None else replace(plan, bytes_below=int(least)) for plan in found)


@cache
def table() -> tuple[Plan, ...]:
    """`read`, once."""
    return read()


def shape_of(x: Tensor) -> Shape | None:
    """x (N, C, *S) as the programs see it; None where it is neither planar nor interleaved in memory, or of another dtype."""
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in DTYPES or x.dim() < 2 or x.numel() == 0:
        return None
    N, C = x.shape[:2]
    positions = x.numel() // (N * C)
    if x.is_contiguous() and positions > 1:
        return Shape(dtype, True, N, C, positions)
    if x.movedim(1, -1).is_contiguous():
        return Shape(dtype, False, N * positions, C, 1)
    return None


def left_to_torch(shape: Shape) -> str | None:
    """Why torch's operators compute this shape if they accept the call; None where a plan does."""
    first = next((plan for plan in table() if plan.fits(shape)), None)
    return first.why if first is not None and first.way == "none" else None


def cut(shape: Shape) -> Cut | str:
    """The cut of the first plan that fits, or why there is none."""
    for plan in table():
        if plan.way != "none" and plan.fits(shape):
            found = cut_by(plan, shape)
            return found if found.beyond is None else found.beyond
    return "no plan fits"


def cut_by(plan: Plan, shape: Shape) -> Cut:
    """The tile of a plan: as wide as wastes little, and then as high as the plan's number of values."""
    if plan.flat:
        shape = replace(shape, planar=False, flat=True)
    if plan.way == "in_registers":
        height, width = _power_of_two(shape.rows), _power_of_two(shape.positions)
        if not shape.planar:
            width = max(min(plan.tile // height, _power_of_two(shape.channels)), 1)
    elif shape.planar:
        widths = [1 << bits for bits in range(5, 14) if 1 << bits <= max(min(plan.widest, plan.tile), 32)]
        exact = [width for width in widths if width >= 64 and shape.positions % width == 0]
        width = max(exact or widths, key=lambda width: (_used(shape.positions, width), width))
        height = min(max(plan.tile // width, 1), _power_of_two(shape.rows))
    else:
        width = min(_power_of_two(shape.channels * shape.columns), plan.widest)
        height = min(max(plan.tile // width, 1), _power_of_two(shape.rows))
    return Cut(plan, shape, height, width)


def _used(size: int, width: int) -> int:
    """Eighths of the columns of all tiles that hold values."""
    return round(8 * size / (_ceil(size, width) * width))


def _ceil(size: int, by: int) -> int:
    return -(-size // by)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
