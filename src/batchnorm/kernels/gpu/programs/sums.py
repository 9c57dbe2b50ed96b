"""Σ(x - shift) and Σ(x - shift)² of a piece, in float32, and what they say of the moments, in float64.

The shift is the mean of the piece's first tile. A float32 sum loses nothing that matters as long as the mean is within a few deviations
of the shift. If it is not (the first tile may hold zeros before data at 1e4), the piece is summed once more about its own mean.

In the loop there is no float64, and of each channel only the shift: what a thread holds decides how many of them there are, and so how
many bytes are on their way from memory. Only the last rows of x need a comparison for each value; they are summed after the loop.
"""

import triton
import triton.language as tl

from batchnorm.kernels.gpu.programs.tiles import complete_tiles, per_channel, place, values_before


@triton.jit
def _tile(
    x, mask, t, column, rows, channels, positions,
    LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, COMPLETE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The values of a tile, float32, and which of them count."""
    start, offsets, inside, mask_start, mask_offsets, mask_inside = place(
        t, column, rows, channels, positions, LAYOUT, BR, BK
    )
    if mask is not None:
        inside = inside & (tl.load(mask + mask_start + mask_offsets, mask=mask_inside, other=0) != 0)
        values = tl.load(x + start + offsets, mask=inside, other=0.0)
    elif COMPLETE and EVEN:
        values = tl.load(x + start + offsets)
    else:
        values = tl.load(x + start + offsets, mask=inside, other=0.0)
    return values.to(tl.float32), inside


@triton.jit
def _sums_about(
    x, mask, shift, first, last, column, rows, channels, positions,
    LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Σ(x - shift), Σ(x - shift)² and the count of tiles first ... last - 1."""
    a0 = tl.zeros((BR, BK), tl.float32)
    a1 = tl.zeros((BR, BK), tl.float32)
    a2 = tl.zeros((BR, BK), tl.float32)
    complete = complete_tiles(rows, positions, LAYOUT, BR, BK)
    for t in tl.range(first, tl.minimum(last, complete), num_stages=STAGES):  # the loads of later tiles are under way
        values, counts = _tile(x, mask, t, column, rows, channels, positions, LAYOUT, BR, BK, True, EVEN)
        d = values - shift[None, :]
        if mask is not None:
            a0 += counts.to(tl.float32)
            d = tl.where(counts, d, 0.0)
        elif not EVEN:
            d = tl.where(counts, d, 0.0)
        a1 += d
        a2 += d * d
    for t in tl.range(tl.maximum(first, complete), last, num_stages=1):
        values, counts = _tile(x, mask, t, column, rows, channels, positions, LAYOUT, BR, BK, False, EVEN)
        d = tl.where(counts, values - shift[None, :], 0.0)
        if mask is not None:
            a0 += counts.to(tl.float32)
        a1 += d
        a2 += d * d
    if mask is not None:
        n = per_channel(a0, LAYOUT)
    else:
        before = values_before(first, rows, positions, LAYOUT, BR, BK)
        n = (values_before(last, rows, positions, LAYOUT, BR, BK) - before).to(tl.float32)
        n = n + tl.zeros(shift.shape, tl.float32)
    return per_channel(a1, LAYOUT), per_channel(a2, LAYOUT), n


@triton.jit
def sums_of_piece(
    x, mask, first, last, column, rows, channels, positions,
    LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Shift, Σ(x - shift), Σ(x - shift)² and the count, float32, (BK,) or (1,)."""
    values, counts = _tile(x, mask, first, column, rows, channels, positions, LAYOUT, BR, BK, False, EVEN)
    shift = per_channel(values, LAYOUT) / tl.maximum(per_channel(counts.to(tl.float32), LAYOUT), 1.0)
    shift = tl.where(tl.abs(shift) < 3e38, shift, 0.0)  # a NaN or an Inf shows in the sums anyway
    s1 = tl.zeros(shift.shape, tl.float32)
    s2 = tl.zeros(shift.shape, tl.float32)
    n = tl.zeros(shift.shape, tl.float32)
    tries = 0
    again = 1
    while again > 0:
        s1, s2, n = _sums_about(
            x, mask, shift, first, last, column, rows, channels, positions, LAYOUT, BR, BK, EVEN, STAGES
        )
        far = s1 * s1 > 16.0 * (s2 * n - s1 * s1)  # the mean is 4 deviations from the shift, or more
        tries += 1
        again = tl.where(tries < 2, tl.max(far.to(tl.int32), 0), 0)
        if again > 0:
            shift = tl.where(far, shift + s1 / tl.maximum(n, 1.0), shift)
    return shift, s1, s2, n


@triton.jit
def moments(shift, s1, s2, n):
    """Count, mean and M2, float64, from the sums of a piece."""
    n = n.to(tl.float64)
    s1 = s1.to(tl.float64)
    step = s1 / tl.maximum(n, 1.0)
    m2 = s2.to(tl.float64) - s1 * step
    return n, shift.to(tl.float64) + step, tl.where(m2 < 0, 0.0, m2)
