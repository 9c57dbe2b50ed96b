"""How x is cut: a tile is what a program holds in registers at once, a piece is a run of tiles that one program sums.

LAYOUT says what x is:

    planar        (N, C, S): tile t is BR samples (`rows` = N) by BK positions (`positions` = S) of one channel
    interleaved   (M, C): tile t is BR rows (`rows` = M) of BK channels, and `positions` is 1
    flat          planar in memory, taken as (N, C · S): tile t is BR samples of BK columns, and column k belongs to channel k // S. So
                  planes of 7x7 are read in wide loads; sums are those of columns, and are merged over the S columns of a channel

UNIT divides S (planar) or C, which is passed in units of it: that is how Triton learns that a load of 16 bytes is aligned. It finds out by
itself for multiples of 16 only, and rows of 196 or 24 values would be read value by value.

The number of a tile is a value of the program, never a number of Python: the first one is `tiles * 0`.
"""

import triton
import triton.language as tl

# Arguments of which Triton compiles no variants: what it has to know of sizes, UNIT and EVEN say.
SIZES = ("pieces", "tiles", "rows", "channels", "positions", "blocks", "values", "columns")


@triton.jit
def sizes(channels, positions, LAYOUT: tl.constexpr, UNIT: tl.constexpr):
    """C and S, from arguments of which one is in units."""
    if LAYOUT == "planar":
        positions = positions * UNIT
    else:
        channels = channels * UNIT
    return channels, positions


@triton.jit
def row(channels, positions, LAYOUT: tl.constexpr):
    """How many sums a piece has: one for each channel, or for each column."""
    if LAYOUT == "flat":
        return channels * positions
    else:
        return channels


@triton.jit
def channels_of(block, channels, positions, LAYOUT: tl.constexpr, BK: tl.constexpr):
    """What a block of x holds: the first channel or column, all of them, their channels, and which exist."""
    WIDTH: tl.constexpr = 1 if LAYOUT == "planar" else BK
    first = block * WIDTH
    k = first + tl.arange(0, WIDTH)
    c = k
    if LAYOUT == "flat":
        c = k // positions
    return first, k, c, c < channels


@triton.jit
def first_tile(piece, pieces, tiles):
    """Where a piece begins; where the next one begins, it ends."""
    return (piece.to(tl.int64) * tiles // pieces).to(tl.int32)


@triton.jit
def place(t, first, rows, channels, positions, LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """Tile t of the block that begins at `first`: its first element (int64), the offsets of the others, and which of them exist; then
    the same three of the mask.
    """
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    if LAYOUT == "planar":
        across = tl.cdiv(positions, BK)
        n = (t // across) * BR
        s = (t % across) * BK
        start = (n.to(tl.int64) * channels + first) * positions + s
        offsets = r[:, None] * (channels * positions) + k[None, :]
        inside = (r < rows - n)[:, None] & (k < positions - s)[None, :]
        mask_start = n.to(tl.int64) * positions + s
        mask_offsets = r[:, None] * positions + k[None, :]
        mask_inside = inside
    else:
        m = t * BR
        width = row(channels, positions, LAYOUT)
        start = m.to(tl.int64) * width + first
        offsets = r[:, None] * width + k[None, :]
        inside = (r < rows - m)[:, None] & (k < width - first)[None, :]
        if LAYOUT == "flat":
            mask_start = m.to(tl.int64) * positions
            mask_offsets = r[:, None] * positions + ((first + k) % positions)[None, :]
            mask_inside = inside
        else:
            mask_start = m.to(tl.int64)
            mask_offsets = r[:, None]
            mask_inside = (r < rows - m)[:, None]
    return start, offsets, inside, mask_start, mask_offsets, mask_inside


@triton.jit
def place_of_sums(q, c, channels, columns, FLAT: tl.constexpr):
    """Where the sums q of channels c are: of piece q; or flat, of piece q // columns, in column c · columns + q % columns."""
    if FLAT:
        column = c[None, :] * columns + (q % columns)[:, None]
        return (q // columns).to(tl.int64)[:, None] * channels * columns + column
    else:
        return q.to(tl.int64)[:, None] * channels + c[None, :]


@triton.jit
def complete_tiles(rows, positions, LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """How many tiles have BR rows: the first so many."""
    complete = rows // BR
    if LAYOUT == "planar":
        complete = complete * tl.cdiv(positions, BK)
    return complete


@triton.jit
def per_channel(values, LAYOUT: tl.constexpr):
    """The sum of a tile for each of its channels or columns: (BK,), or (1,) planar."""
    total = tl.sum(values, 0)
    if LAYOUT == "planar":
        total = tl.sum(total, 0)[None]
    return total


@triton.jit
def values_before(t, rows, positions, LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """How many values each channel or column has in the tiles before t, int64."""
    if LAYOUT == "planar":
        across = tl.cdiv(positions, BK)
        above = t // across
        height = tl.minimum(rows - above * BR, BR)
        beside = tl.where(height > 0, height, 0).to(tl.int64) * tl.minimum((t % across) * BK, positions)
        return tl.minimum(above.to(tl.int64) * BR, rows) * positions + beside
    else:
        return tl.minimum(t.to(tl.int64) * BR, rows)
