"""The backward, cut like the forward: partial sums of g and g · x̂, their merge, the map.

    g = dy · activation'(z)      dx = weight · rstd · (g - Σg / count - x̂ · Σg·x̂ / count)

x̂ is computed again from x, and z from x̂, or activation' from y where that is enough (`FROM_OUTPUT`): `beside` is then y, and otherwise
the residual.
"""

import triton
import triton.language as tl

from batchnorm.kernels.gpu.programs.channels import parameter, split
from batchnorm.kernels.gpu.programs.elementwise import derivative, narrowed, rounded
from batchnorm.kernels.gpu.programs.tiles import (
    SIZES,
    channels_of,
    complete_tiles,
    first_tile,
    per_channel,
    place,
    place_of_sums,
    row,
    sizes,
)


@triton.jit
def _normalization(mean, rstd, weight, bias, c, ok):
    """What x̂ and z need of each channel, float32."""
    high, low = split(parameter(mean, c, ok, 0.0))
    scale = parameter(rstd, c, ok, 0.0).to(tl.float32)
    return high, low, scale, parameter(weight, c, ok, 1.0).to(tl.float32), parameter(bias, c, ok, 0.0).to(tl.float32)


@triton.jit
def _gradient(
    dy, x, beside, mask, by, slope, t, column, rows, channels, positions,
    LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, ALL: tl.constexpr, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """g and x̂ of a tile, float32, 0 where not counted; ALL says that every value of the tile exists."""
    high, low, rstd, weight, bias = by
    start, offsets, inside, mask_start, mask_offsets, mask_inside = place(
        t, column, rows, channels, positions, LAYOUT, BR, BK
    )
    if mask is not None:
        inside = inside & (tl.load(mask + mask_start + mask_offsets, mask=mask_inside, other=0) != 0)
    at = start + offsets
    if ALL and mask is None:
        values, gradient = tl.load(x + at), tl.load(dy + at)
    else:
        values, gradient = tl.load(x + at, mask=inside, other=0.0), tl.load(dy + at, mask=inside, other=0.0)
    xhat = ((values.to(tl.float32) - high[None, :]) - low[None, :]) * rstd[None, :]
    g = gradient.to(tl.float32)
    if ACTIVATION != "identity":
        if FROM_OUTPUT:
            z = tl.load(beside + at, mask=inside, other=0.0).to(tl.float32)
        else:
            z = xhat * weight[None, :] + bias[None, :]
            if beside is not None:
                z += tl.load(beside + at, mask=inside, other=0.0).to(tl.float32)
        g = g * derivative(z, slope, ACTIVATION)
    if not (ALL and mask is None):
        g, xhat = tl.where(inside, g, 0.0), tl.where(inside, xhat, 0.0)
    return g, xhat


@triton.jit
def _sums(
    dy, x, beside, mask, by, slope, first, last, column, rows, channels, positions,
    LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """Σg and Σg·x̂ of tiles first ... last - 1, float32."""
    a1 = tl.zeros((BR, BK), tl.float32)
    a2 = tl.zeros((BR, BK), tl.float32)
    complete = complete_tiles(rows, positions, LAYOUT, BR, BK)
    for t in tl.range(first, tl.minimum(last, complete), num_stages=STAGES):
        g, xhat = _gradient(
            dy,
            x,
            beside,
            mask,
            by,
            slope,
            t,
            column,
            rows,
            channels,
            positions,
            LAYOUT,
            BR,
            BK,
            EVEN,
            ACTIVATION,
            FROM_OUTPUT,
        )
        a1 += g
        a2 += g * xhat
    for t in tl.range(tl.maximum(first, complete), last, num_stages=1):
        g, xhat = _gradient(
            dy,
            x,
            beside,
            mask,
            by,
            slope,
            t,
            column,
            rows,
            channels,
            positions,
            LAYOUT,
            BR,
            BK,
            False,
            ACTIVATION,
            FROM_OUTPUT,
        )
        a1 += g
        a2 += g * xhat
    return per_channel(a1, LAYOUT), per_channel(a2, LAYOUT)


@triton.jit
def _share_of_one(count, rows, positions):
    """1 / count, once for all channels: a float64 division is a subroutine, which needs a stack."""
    divisor = (rows.to(tl.int64) * positions).to(tl.float64)
    if count is not None:
        divisor = tl.load(count).to(tl.float64)
    return 1.0 / tl.maximum(divisor, 1.0)


@triton.jit
def _store_sums(sums, dweight, dbias, sum_grad, sum_grad_xhat, c, ok, channels):
    tl.store(sums + c, sum_grad, mask=ok)
    tl.store(sums + channels + c, sum_grad_xhat, mask=ok)
    if dweight is not None:
        tl.store(dweight + c, narrowed(sum_grad_xhat, dweight), mask=ok)
    if dbias is not None:
        tl.store(dbias + c, narrowed(sum_grad, dbias), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def partial_gradient_sums(
    dy, x, beside, mask, mean, rstd, weight, bias, slope, sums, pieces, tiles, rows, channels, positions, blocks,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr,
):  # fmt: skip
    """Σg and Σg·x̂ of each piece, (2, pieces, C) float32, or (2, pieces, C · S) flat."""
    channels, positions = sizes(channels, positions, LAYOUT, UNIT)
    block, piece = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    column, k, c, ok = channels_of(block, channels, positions, LAYOUT, BK)
    first, last = first_tile(piece, pieces, tiles), first_tile(piece + 1, pieces, tiles)
    s1, s2 = _sums(
        dy, x, beside, mask, _normalization(mean, rstd, weight, bias, c, ok), slope, first, last, column,
        rows, channels, positions, LAYOUT, BR, BK, EVEN, STAGES, ACTIVATION, FROM_OUTPUT,
    )  # fmt: skip
    width = row(channels, positions, LAYOUT)
    at = sums + piece.to(tl.int64) * width + k
    tl.store(at, s1, mask=ok)
    tl.store(at + pieces.to(tl.int64) * width, s2, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def finish_gradient_sums(
    partial, sums, dweight, dbias, pieces, channels, columns, BP: tl.constexpr, BC: tl.constexpr, FLAT: tl.constexpr
):
    """Σg and Σg·x̂ of BC channels, (2, C) float64, merged in the order of the pieces; and rounded to the parameters' dtype."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = c < channels
    p = tl.arange(0, BP)
    all_pieces = pieces.to(tl.int64) * channels * columns
    s1 = tl.zeros((BC,), tl.float64)
    s2 = tl.zeros((BC,), tl.float64)
    for q in range(0, pieces * columns, BP):
        at = place_of_sums(q + p, c, channels, columns, FLAT)
        exists = ((q + p) < pieces * columns)[:, None] & ok[None, :]
        s1 += tl.sum(tl.load(partial + at, mask=exists, other=0.0).to(tl.float64), 0)
        s2 += tl.sum(tl.load(partial + all_pieces + at, mask=exists, other=0.0).to(tl.float64), 0)
    _store_sums(sums, dweight, dbias, s1, s2, c, ok, channels)


@triton.jit
def _map_tile(
    dy, x, beside, mask, dx, dresidual, by, means, slope, t, column, rows, channels, positions,
    LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    mean_g, mean_gxhat = means
    g, xhat = _gradient(
        dy,
        x,
        beside,
        mask,
        by,
        slope,
        t,
        column,
        rows,
        channels,
        positions,
        LAYOUT,
        BR,
        BK,
        False,
        ACTIVATION,
        FROM_OUTPUT,
    )
    start, offsets, inside, mask_start, mask_offsets, mask_inside = place(
        t, column, rows, channels, positions, LAYOUT, BR, BK
    )
    if dresidual is not None:
        tl.store(dresidual + start + offsets, rounded(g, dresidual), mask=inside)
    if dx is not None:
        d = g
        if not CONSTANT:
            d = g - mean_g[None, :] - xhat * mean_gxhat[None, :]
        d = d * (by[3] * by[2])[None, :]
        if mask is not None:
            d = tl.where(tl.load(mask + mask_start + mask_offsets, mask=mask_inside, other=0) != 0, d, 0.0)
        tl.store(dx + start + offsets, rounded(d, dx), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def apply_gradient(
    dy, x, beside, mask, dx, dresidual, mean, rstd, mean_g, mean_gxhat, count, weight, bias, slope,
    pieces, tiles, rows, channels, positions, blocks,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, CONSTANT: tl.constexpr, OVER_COUNT: tl.constexpr,
):  # fmt: skip
    """dx and dresidual, from the last tile to the first. With OVER_COUNT, `mean_g` and `mean_gxhat` are sums, to be divided by how many
    values a channel has: all, or `count`.
    """
    channels, positions = sizes(channels, positions, LAYOUT, UNIT)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block, piece = program % blocks, program // blocks
    column, _, c, ok = channels_of(block, channels, positions, LAYOUT, BK)
    share = 1.0
    if OVER_COUNT:
        share = _share_of_one(count, rows, positions)
    means = (
        (parameter(mean_g, c, ok, 0.0) * share).to(tl.float32),
        (parameter(mean_gxhat, c, ok, 0.0) * share).to(tl.float32),
    )
    by = _normalization(mean, rstd, weight, bias, c, ok)
    first, last = first_tile(piece, pieces, tiles), first_tile(piece + 1, pieces, tiles)
    for back in range(last - first):
        _map_tile(
            dy, x, beside, mask, dx, dresidual, by, means, slope, last - 1 - back, column, rows, channels, positions,
            LAYOUT, BR, BK, ACTIVATION, FROM_OUTPUT, CONSTANT,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def whole_gradient(
    dy, x, beside, mask, dx, dresidual, mean, rstd, count, weight, bias, slope, sums, dweight, dbias, tiles, rows, channels, positions,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """Both by one program for each channel, which reads the channel again from the last tile to the first."""
    channels, positions = sizes(channels, positions, LAYOUT, UNIT)
    column, _, c, ok = channels_of(tl.program_id(0), channels, positions, LAYOUT, BK)
    by = _normalization(mean, rstd, weight, bias, c, ok)
    s1, s2 = _sums(
        dy, x, beside, mask, by, slope, tiles * 0, tiles, column, rows, channels, positions,
        LAYOUT, BR, BK, EVEN, STAGES, ACTIVATION, FROM_OUTPUT,
    )  # fmt: skip
    s1, s2 = s1.to(tl.float64), s2.to(tl.float64)
    _store_sums(sums, dweight, dbias, s1, s2, c, ok, channels)
    share = _share_of_one(count, rows, positions)
    mean_g, mean_gxhat = (s1 * share).to(tl.float32), (s2 * share).to(tl.float32)
    for back in range(tiles):
        _map_tile(
            dy, x, beside, mask, dx, dresidual, by, (mean_g, mean_gxhat), slope, tiles - 1 - back, column,
            rows, channels, positions, LAYOUT, BR, BK, ACTIVATION, FROM_OUTPUT, CONSTANT,
        )  # fmt: skip
