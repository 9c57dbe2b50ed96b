"""How x is cut: a tile is what a program holds in registers at once, a piece is a run of tiles that one program sums.

Planar, x is (N, C, S): tile t is BR samples (`rows` = N) by BK positions (`positions` = S) of the one channel c. Interleaved, x is
(M, C): tile t is BR rows (`rows` = M) of the BK channels from c, and `positions` is 1.

UNIT divides the innermost size, S or C, which is passed in units of it: that is how Triton learns that a load of 16 bytes is aligned. It
finds out by itself for multiples of 16 only, and rows of 196 or 24 values would be read value by value.

The number of a tile is a value of the program, never a number of Python: the first one is `tiles * 0`.
"""

import triton
import triton.language as tl

# Arguments of which Triton compiles no variants: what it has to know of sizes, UNIT and EVEN say.
SIZES = ("pieces", "tiles", "rows", "channels", "positions", "blocks", "values")


@triton.jit
def sizes(channels, positions, PLANAR: tl.constexpr, UNIT: tl.constexpr):
    """C and S, from arguments in which the innermost one is in units."""
    if PLANAR:
        positions = positions * UNIT
    else:
        channels = channels * UNIT
    return channels, positions


@triton.jit
def first_tile(piece, pieces, tiles):
    """Where a piece begins; where the next one begins, it ends."""
    return (piece.to(tl.int64) * tiles // pieces).to(tl.int32)


@triton.jit
def place(t, c, rows, channels, positions, PLANAR: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """Tile t: its first element (int64), the offsets of the others, and which of them exist; then the same three of the mask."""
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    if PLANAR:
        across = tl.cdiv(positions, BK)
        n = (t // across) * BR
        s = (t % across) * BK
        start = (n.to(tl.int64) * channels + c) * positions + s
        offsets = r[:, None] * (channels * positions) + k[None, :]
        inside = (r < rows - n)[:, None] & (k < positions - s)[None, :]
        mask_start = n.to(tl.int64) * positions + s
        mask_offsets = r[:, None] * positions + k[None, :]
        mask_inside = inside
    else:
        m = t * BR
        start = m.to(tl.int64) * channels + c
        offsets = r[:, None] * channels + k[None, :]
        inside = (r < rows - m)[:, None] & (k < channels - c)[None, :]
        mask_start = m.to(tl.int64)
        mask_offsets = r[:, None]
        mask_inside = (r < rows - m)[:, None]
    return start, offsets, inside, mask_start, mask_offsets, mask_inside


@triton.jit
def complete_tiles(rows, positions, PLANAR: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """How many tiles have BR rows: the first so many."""
    complete = rows // BR
    if PLANAR:
        complete = complete * tl.cdiv(positions, BK)
    return complete


@triton.jit
def per_channel(values, PLANAR: tl.constexpr):
    """The sum of a tile for each of its channels: (BK,), or (1,) planar."""
    total = tl.sum(values, 0)
    if PLANAR:
        total = tl.sum(total, 0)[None]
    return total


@triton.jit
def values_before(t, rows, positions, PLANAR: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """How many values each channel has in the tiles before t, int64."""
    if PLANAR:
        across = tl.cdiv(positions, BK)
        above = t // across
        height = tl.minimum(rows - above * BR, BR)
        beside = tl.where(height > 0, height, 0).to(tl.int64) * tl.minimum((t % across) * BK, positions)
        return tl.minimum(above.to(tl.int64) * BR, rows) * positions + beside
    else:
        return tl.minimum(t.to(tl.int64) * BR, rows)
