"""What happens to one value: the activations of `kernels.activation.ROWS` and their derivatives, and rounding to the output's dtype.

`libdevice` has no interpreter, so tanh is written as a sigmoid: 1 + tanh(u) = 2 · sigmoid(2u).
"""

import triton
import triton.language as tl


@triton.jit
def rounded(value, like):
    """A float32 value in the dtype that `like` points to, rounded to nearest even."""
    return value.to(like.dtype.element_ty)


@triton.jit
def narrowed(value, like):
    """A float64 value in the dtype that `like` points to: to half precision by way of float32, as torch does it."""
    if like.dtype.element_ty == tl.float64:
        return value
    else:
        return value.to(tl.float32).to(like.dtype.element_ty)


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """activation(z); NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "hardswish":
        t = z + 3.0
        z = z * tl.where(t < 0, 0.0, tl.where(t > 6, 6.0, t)) * (1.0 / 6.0)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z


@triton.jit
def derivative(z, slope, ACTIVATION: tl.constexpr):
    """d activation / dz; at a kink it is torch's choice, as in `ROWS`."""
    d = tl.full(z.shape, 1.0, tl.float32)
    if ACTIVATION == "relu":
        d = tl.where(z <= 0, 0.0, d)
    elif ACTIVATION == "relu6":
        d = tl.where((z <= 0) | (z >= 6), 0.0, d)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(z > 0, d, slope)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(z)
        d = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "hardswish":
        d = tl.where(z <= -3, 0.0, tl.where(z < 3, z * (1.0 / 3.0) + 0.5, d))
    elif ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        d = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    return d
