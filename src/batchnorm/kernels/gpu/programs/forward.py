"""The forward: partial sums, their merge, the map; or all of it by one program for each channel, where that reads x once.

`split` cuts x into pieces, however few channels there are, in three launches: `partial_sums` of each piece, `finish` merges them in
their order, in float64, and `apply` computes y, beginning with what was read last, which the L2 cache may still hold. No program waits for
another. The last program of `finish` to arrive updates the running statistics; which one that is changes nothing it computes.
`whole` and `in_registers` give each channel (interleaved: each BK channels) to one program. The first reads x twice, the second time
from the L2 cache if the channels at work fit into it; the second holds its values in registers.
"""

import triton
import triton.language as tl

from batchnorm.kernels.gpu.programs.channels import (
    coefficients,
    joined,
    load_coefficients,
    store_coefficients,
    store_statistics,
    update_running,
)
from batchnorm.kernels.gpu.programs.elementwise import activate, rounded
from batchnorm.kernels.gpu.programs.sums import moments, sums_of_piece
from batchnorm.kernels.gpu.programs.tiles import (
    SIZES,
    channels_of,
    first_tile,
    per_channel,
    place,
    place_of_sums,
    row,
    sizes,
)


@triton.jit(do_not_specialize=SIZES)
def partial_sums(
    x, mask, sums, arrivals, pieces, tiles, rows, channels, positions, blocks,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Shift, Σ(x - shift), Σ(x - shift)² and the count of each piece, (4, pieces, C) float32, or (4, pieces, C · S) flat; sets the counter
    of arrivals to 0.
    """
    channels, positions = sizes(channels, positions, LAYOUT, UNIT)
    program = tl.program_id(0)
    if program == 0:
        tl.store(arrivals, 0)
    block, piece = program % blocks, program // blocks
    first, last = first_tile(piece, pieces, tiles), first_tile(piece + 1, pieces, tiles)
    column, k, _, ok = channels_of(block, channels, positions, LAYOUT, BK)
    shift, s1, s2, n = sums_of_piece(
        x, mask, first, last, column, rows, channels, positions, LAYOUT, BR, BK, EVEN, STAGES
    )
    width = row(channels, positions, LAYOUT)
    at = sums + piece.to(tl.int64) * width + k
    all_pieces = pieces.to(tl.int64) * width
    tl.store(at, shift, mask=ok)
    tl.store(at + all_pieces, s1, mask=ok)
    tl.store(at + 2 * all_pieces, s2, mask=ok)
    tl.store(at + 3 * all_pieces, n, mask=ok)


@triton.jit
def _moments_of_pieces(sums, all_pieces, at, ok):
    shift = tl.load(sums + at, mask=ok, other=0.0)
    s1 = tl.load(sums + all_pieces + at, mask=ok, other=0.0)
    s2 = tl.load(sums + 2 * all_pieces + at, mask=ok, other=0.0)
    return moments(shift, s1, s2, tl.load(sums + 3 * all_pieces + at, mask=ok, other=0.0))


@triton.jit(do_not_specialize=SIZES)
def finish(
    sums, arrivals, statistics, coefs, weight, bias, eps, eps_low, running_mean, running_var, batches, skipped, momentum, momentum_low,
    pieces, channels, columns, BP: tl.constexpr, BC: tl.constexpr, FLAT: tl.constexpr, UNBIASED: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Statistics and coefficients of BC channels, by the formula of `Moments.pooled`; the last program updates the running statistics.

    Of each channel a piece has `columns` sums, one for each of its columns.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = c < channels
    p = tl.arange(0, BP)
    all_pieces = pieces.to(tl.int64) * channels * columns
    total = tl.zeros((BC,), tl.float64)
    mean = tl.zeros((BC,), tl.float64)
    for q in range(0, pieces * columns, BP):
        at = place_of_sums(q + p, c, channels, columns, FLAT)
        n, center, _ = _moments_of_pieces(sums, all_pieces, at, ((q + p) < pieces * columns)[:, None] & ok[None, :])
        total += tl.sum(n, 0)
        mean += tl.sum(tl.where(n > 0, n * center, 0.0), 0)
    divisor = tl.maximum(total, 1.0)
    mean = mean / divisor
    rest = tl.zeros((BC,), tl.float64)
    m2 = tl.zeros((BC,), tl.float64)
    for q in range(0, pieces * columns, BP):
        at = place_of_sums(q + p, c, channels, columns, FLAT)
        n, center, spread = _moments_of_pieces(
            sums, all_pieces, at, ((q + p) < pieces * columns)[:, None] & ok[None, :]
        )
        d = tl.where(n > 0, center - mean[None, :], 0.0)
        rest += tl.sum(n * d, 0)
        m2 += tl.sum(spread + n * d * d, 0)
    rest = rest / divisor
    m2 = m2 - total * rest * rest
    m2 = tl.where(m2 < 0, 0.0, m2)
    mean = mean + rest
    rstd = store_statistics(statistics, total, mean, m2, joined(eps, eps_low), c, ok, channels)
    if coefs is not None:
        store_coefficients(coefs, mean, rstd, weight, bias, c, ok, channels)
    count = tl.max(total, 0)
    if tl.program_id(0) == 0:
        tl.store(statistics + 3 * channels, count)
    if running_mean is not None:
        tl.debug_barrier()  # all threads have stored before the one that tells so
        if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            tl.debug_barrier()
            update_running(
                statistics, statistics + 2 * channels, count, running_mean, running_var, batches, skipped,
                joined(momentum, momentum_low), 0.0, channels, UNBIASED, SKIP, 1024,
            )  # fmt: skip


@triton.jit
def _map_tile(
    x, residual, mask, y, coefs, slope, t, column, rows, channels, positions,
    LAYOUT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    high, low, scale, scale_low, shift = coefs
    start, offsets, inside, mask_start, mask_offsets, mask_inside = place(
        t, column, rows, channels, positions, LAYOUT, BR, BK
    )
    values = tl.load(x + start + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
    d = (values.to(tl.float32) - high[None, :]) - low[None, :]
    z = d * scale[None, :] + shift[None, :]
    if x.dtype.element_ty == tl.float32:  # what rounding the scale loses is half an ulp of y
        z = d * scale[None, :] + (d * scale_low[None, :] + shift[None, :])
    if residual is not None:
        beside = tl.load(residual + start + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
        z += beside.to(tl.float32)
    z = activate(z, slope, ACTIVATION)
    if mask is not None:
        z = tl.where(tl.load(mask + mask_start + mask_offsets, mask=mask_inside, other=0) != 0, z, 0.0)
    tl.store(y + start + offsets, rounded(z, y), mask=inside, eviction_policy="evict_first")


@triton.jit(do_not_specialize=SIZES)
def apply(
    x, residual, mask, y, coefs, slope, pieces, tiles, rows, channels, positions, blocks,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y, from the last tile to the first."""
    channels, positions = sizes(channels, positions, LAYOUT, UNIT)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block, piece = program % blocks, program // blocks
    column, _, c, ok = channels_of(block, channels, positions, LAYOUT, BK)
    values = load_coefficients(coefs, c, ok, channels)
    first, last = first_tile(piece, pieces, tiles), first_tile(piece + 1, pieces, tiles)
    for back in range(last - first):
        _map_tile(
            x, residual, mask, y, values, slope, last - 1 - back, column, rows, channels, positions,
            LAYOUT, BR, BK, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def whole(
    x, residual, mask, y, statistics, weight, bias, eps, eps_low, slope, tiles, rows, channels, positions,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Statistics and y of a channel, which is summed tile by tile and read again from the last tile to the first."""
    channels, positions = sizes(channels, positions, LAYOUT, UNIT)
    column, _, c, ok = channels_of(tl.program_id(0), channels, positions, LAYOUT, BK)
    shift, s1, s2, n = sums_of_piece(
        x, mask, tiles * 0, tiles, column, rows, channels, positions, LAYOUT, BR, BK, EVEN, STAGES
    )
    count, mean, m2 = moments(shift, s1, s2, n)
    rstd = store_statistics(statistics, count, mean, m2, joined(eps, eps_low), c, ok, channels)
    if tl.program_id(0) == 0:
        tl.store(statistics + 3 * channels, tl.max(count, 0))
    values = coefficients(mean, rstd, weight, bias, c, ok)
    for back in range(tiles):
        _map_tile(
            x, residual, mask, y, values, slope, tiles - 1 - back, column, rows, channels, positions,
            LAYOUT, BR, BK, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def in_registers(
    x, residual, mask, y, statistics, weight, bias, eps, eps_low, slope, rows, channels, positions,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The same where a channel is one tile: x is read once, and summed twice, the second time about its mean."""
    channels, positions = sizes(channels, positions, LAYOUT, UNIT)
    column, _, c, ok = channels_of(tl.program_id(0), channels, positions, LAYOUT, BK)
    start, offsets, inside, mask_start, mask_offsets, mask_inside = place(
        rows * 0, column, rows, channels, positions, LAYOUT, BR, BK
    )
    stored = tl.load(x + start + offsets, mask=inside, other=0.0)
    counts = inside
    if mask is not None:
        counts = inside & (tl.load(mask + mask_start + mask_offsets, mask=mask_inside, other=0) != 0)
    n = per_channel(counts.to(tl.int32), LAYOUT).to(tl.float32)
    near = per_channel(tl.where(counts, stored.to(tl.float32), 0.0), LAYOUT) / tl.maximum(n, 1.0)
    near = tl.where(tl.abs(near) < 3e38, near, 0.0)
    d = tl.where(counts, stored.to(tl.float32) - near[None, :], 0.0)
    count, mean, m2 = moments(near, per_channel(d, LAYOUT), per_channel(d * d, LAYOUT), n)
    rstd = store_statistics(statistics, count, mean, m2, joined(eps, eps_low), c, ok, channels)
    if tl.program_id(0) == 0:
        tl.store(statistics + 3 * channels, tl.max(count, 0))
    high, low, scale, scale_low, shift = coefficients(mean, rstd, weight, bias, c, ok)
    d = (stored.to(tl.float32) - high[None, :]) - low[None, :]
    z = d * scale[None, :] + shift[None, :]
    if x.dtype.element_ty == tl.float32:
        z = d * scale[None, :] + (d * scale_low[None, :] + shift[None, :])
    if residual is not None:
        z += tl.load(residual + start + offsets, mask=inside, other=0.0).to(tl.float32)
    z = activate(z, slope, ACTIVATION)
    if mask is not None:
        z = tl.where(counts, z, 0.0)
    tl.store(y + start + offsets, rounded(z, y), mask=inside)
