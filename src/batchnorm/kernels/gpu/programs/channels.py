"""What is computed once for each channel: coefficients of the map, statistics, running statistics.

Coefficients are (5, C) float32: high, low, scale, scale_low, shift. The map computes

    z = ((x - high) - low) · (scale + scale_low) + shift

where high + low is the mean and scale + scale_low is rstd · weight, each to 48 bits: x - high is exact where x is near the mean, so a mean
of 1e4 costs no precision. Numbers from the host come in two halves too, because Triton passes them as float32.
"""

import triton
import triton.language as tl

from batchnorm.kernels.gpu.programs.elementwise import narrowed
from batchnorm.kernels.gpu.programs.tiles import SIZES


@triton.jit
def split(value):
    """A float64 as the sum of two float32."""
    high = value.to(tl.float32)
    return high, (value - high.to(tl.float64)).to(tl.float32)


@triton.jit
def joined(high, low):
    """The float64 of two halves, (1,)."""
    zero = tl.zeros((1,), tl.float64)  # whose dtype the sums take: in the interpreter the halves are numbers of Python
    return (zero + high) + (zero + low)


@triton.jit
def parameter(pointer, c, ok, otherwise):
    """A channel value in float64; `otherwise` where there is none."""
    value = tl.zeros(c.shape, tl.float64) + otherwise
    if pointer is not None:
        value = tl.load(pointer + c, mask=ok, other=0.0).to(tl.float64)
    return value


@triton.jit
def coefficients(mean, rstd, weight, bias, c, ok):
    """The five coefficients of channels c."""
    high, low = split(mean)
    scale, scale_low = split(rstd * parameter(weight, c, ok, 1.0))
    return high, low, scale, scale_low, parameter(bias, c, ok, 0.0).to(tl.float32)


@triton.jit
def store_coefficients(coefs, mean, rstd, weight, bias, c, ok, channels):
    high, low, scale, scale_low, shift = coefficients(mean, rstd, weight, bias, c, ok)
    tl.store(coefs + c, high, mask=ok)
    tl.store(coefs + channels + c, low, mask=ok)
    tl.store(coefs + 2 * channels + c, scale, mask=ok)
    tl.store(coefs + 3 * channels + c, scale_low, mask=ok)
    tl.store(coefs + 4 * channels + c, shift, mask=ok)


@triton.jit
def load_coefficients(coefs, c, ok, channels):
    return (
        tl.load(coefs + c, mask=ok, other=0.0),
        tl.load(coefs + channels + c, mask=ok, other=0.0),
        tl.load(coefs + 2 * channels + c, mask=ok, other=0.0),
        tl.load(coefs + 3 * channels + c, mask=ok, other=0.0),
        tl.load(coefs + 4 * channels + c, mask=ok, other=0.0),
    )


@triton.jit
def store_statistics(statistics, count, mean, m2, eps, c, ok, channels):
    """Rows mean, rstd, M2 of (3C + 1,), and the count behind them; returns rstd."""
    rstd = 1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + eps)
    tl.store(statistics + c, mean, mask=ok)
    tl.store(statistics + channels + c, rstd, mask=ok)
    tl.store(statistics + 2 * channels + c, m2, mask=ok)
    return rstd


@triton.jit
def _batch(mean, m2, count, c, ok, UNBIASED: tl.constexpr):
    """Mean and variance of a batch, float64, as the running statistics receive them; read from where other programs have written."""
    divisor = count
    if UNBIASED:
        divisor = count - 1.0
    variance = tl.load(m2 + c, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float64) / tl.where(
        divisor > 0.0, divisor, 1.0
    )
    return tl.load(mean + c, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float64), variance


@triton.jit
def _finite(value, like):
    narrow = narrowed(value, like).to(tl.float64)
    return (tl.abs(value) < float("inf")) & (tl.abs(narrow) < float("inf"))


@triton.jit
def update_running(
    mean, m2, count, running_mean, running_var, batches, skipped, momentum, least, channels,
    UNBIASED: tl.constexpr, SKIP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """All channels, by one program: a batch enters the running statistics whole or not at all. Returns how many channels are not finite.

    running = (1 - momentum) · running + momentum · batch, if the count is at least `least`.
    """
    k = tl.arange(0, BC)
    bad = 0
    if SKIP:
        for first in range(0, channels, BC):
            c = first + k
            ok = c < channels
            new_mean, new_variance = _batch(mean, m2, count, c, ok, UNBIASED)
            fine = _finite(new_mean, running_mean) & _finite(new_variance, running_var)
            bad += tl.sum((ok & ~fine).to(tl.int32), 0)
    if (bad == 0) & (count >= least):
        for first in range(0, channels, BC):
            c = first + k
            ok = c < channels
            new_mean, new_variance = _batch(mean, m2, count, c, ok, UNBIASED)
            old = tl.load(running_mean + c, mask=ok, other=0.0).to(tl.float64)
            value = (1.0 - momentum) * old + momentum * new_mean
            tl.store(running_mean + c, narrowed(value, running_mean), mask=ok)
            old = tl.load(running_var + c, mask=ok, other=0.0).to(tl.float64)
            value = (1.0 - momentum) * old + momentum * new_variance
            tl.store(running_var + c, narrowed(value, running_var), mask=ok)
        if batches is not None:
            tl.store(batches, tl.load(batches) + 1)
    if SKIP:
        if (bad > 0) & (skipped is not None):
            tl.store(skipped, tl.load(skipped) + 1)
    return bad


@triton.jit(do_not_specialize=SIZES)
def update(
    mean, m2, count, values, running_mean, running_var, batches, skipped, momentum, momentum_low, finite, channels,
    UNBIASED: tl.constexpr, SKIP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`update_running` in a launch of its own. The count is `values`, or what only the device knows; then at least 2 are needed."""
    least = 0.0
    n = values.to(tl.float64)
    if count is not None:
        n = tl.load(count).to(tl.float64)
        least = 1.5
    bad = update_running(
        mean, m2, n, running_mean, running_var, batches, skipped, joined(momentum, momentum_low), least, channels,
        UNBIASED, SKIP, BC,
    )  # fmt: skip
    if finite is not None:
        tl.store(finite, (bad == 0).to(tl.uint8))


@triton.jit(do_not_specialize=SIZES)
def prepare(
    mean, spread, weight, bias, eps, eps_low, statistics, coefs, channels, VARIANCE: tl.constexpr, BC: tl.constexpr
):
    """Coefficients from given statistics: `spread` is the variance, to which eps is added, or rstd. Statistics are (2, C) float64."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    ok = c < channels
    center = tl.load(mean + c, mask=ok, other=0.0).to(tl.float64)
    rstd = tl.load(spread + c, mask=ok, other=1.0).to(tl.float64)
    if VARIANCE:
        rstd = 1.0 / tl.sqrt(rstd + joined(eps, eps_low))
    tl.store(statistics + c, center, mask=ok)
    tl.store(statistics + channels + c, rstd, mask=ok)
    store_coefficients(coefs, center, rstd, weight, bias, c, ok, channels)
