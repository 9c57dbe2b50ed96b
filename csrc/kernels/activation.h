// The activations of kernels/activation.py on vectors.
//
// At a kink and for NaN the results are torch's: the comparisons are written so that NaN takes the branch of positive numbers.
#pragma once

#include "api.h"
#include "simd/storage.h"

namespace {

using batchnorm::Activation;
using batchnorm::Task;

// e^x = 2^n · e^r, |r| <= ln(2) / 2, with the polynomial of Cephes' expf: the error is below 2 ulp of float32. x is clamped at 88.3, before
// the result overflows. The result is 0 for x below -87.3, before it becomes subnormal. NaN stays NaN.
INLINE Floats exponential(Floats x) {
    const auto vanishes = x < -87.3f;
    x = x > 88.3f ? Floats{} + 88.3f : x;
    x = vanishes ? Floats{} : x;
    const float magic = 0x1.8p23f;  // added to a number, this leaves the nearest integer in the low bits
    const Floats shifted = x * 0x1.715476p0f + magic;
    const Floats n = shifted - magic;
    Floats r = x - n * 0x1.62e4p-1f;
    r = r - n * 0x1.7f7d1cp-20f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    p = p * bits_as<Floats>((bits_as<Words>(shifted) << 23) + 0x3f800000u);
    return vanishes ? Floats{} : p;
}

// erf to 1 ulp of float32: an odd polynomial up to 475/512, 1 - e^polynomial beyond (after N. Juffa, public domain).
INLINE Floats error_function(Floats x) {
    const Floats magnitude = bits_as<Floats>(bits_as<Words>(x) & 0x7fffffffu);
    const Floats square = x * x;
    Floats far = magnitude * -1.72853470e-5f + 3.83197126e-4f;
    far = far * square + (magnitude * -3.88396438e-3f + 2.42546219e-2f);
    far = far * magnitude - 1.06777877e-1f;
    far = far * magnitude - 6.34846687e-1f;
    far = far * magnitude - 1.28717512e-1f;
    far = far * magnitude - magnitude;
    far = 1.0f - exponential(far);
    far = bits_as<Floats>(bits_as<Words>(far) | (bits_as<Words>(x) & 0x80000000u));
    far = magnitude > 4.0f ? bits_as<Floats>((bits_as<Words>(x) & 0x80000000u) | 0x3f800000u) : far;
    Floats near = square * -5.96761703e-4f + 4.99119423e-3f;
    near = near * square - 2.67681349e-2f;
    near = near * square + 1.12819925e-1f;
    near = near * square - 3.76125336e-1f;
    near = near * square + 1.28379166e-1f;
    near = near * x + x;
    return magnitude > 0.927734375f ? far : near;
}

// float64 calls the C library for each lane, which is slow. x is clamped for the same reasons.
INLINE Doubles exponential(Doubles x) {
    const auto vanishes = x < -708.0;
    x = x > 708.0 ? Doubles{} + 708.0 : x;
    for (int lane = 0; lane < vector_bytes / 8; ++lane) x[lane] = exp(x[lane]);
    return vanishes ? Doubles{} : x;
}
INLINE Doubles error_function(Doubles x) {
    for (int lane = 0; lane < vector_bytes / 8; ++lane) x[lane] = erf(x[lane]);
    return x;
}

template <class Vector>
using LaneOf = __typeof__(Vector{}[0] + 0);

// sigmoid(z) and 1 - sigmoid(z), each to full precision, because the derivatives multiply the latter by z. They are set to 0 and 1 where
// e^-z is clamped, since z times the clamped value would grow again.
template <class Vector>
struct Sigmoid {
    typedef LaneOf<Vector> Real;
    Vector value, rest;

    INLINE explicit Sigmoid(Vector z) {
        const Vector e = exponential(-z);
        const auto far = z < Real(sizeof(Real) == 4 ? -88.3 : -708);
        value = Real(1) / (Real(1) + e);
        rest = far ? Vector{} + Real(1) : e * value;
        value = far ? Vector{} : value;
    }
};

// The formulas of an activation: value(z, slope), and grad(dy, z, slope) = dy · activation'(z). `slope` is that of leaky_relu.
template <Activation kind, class Vector>
struct Formula;

template <class Vector>
struct Formula<Activation::identity, Vector> {
    typedef LaneOf<Vector> Real;
    static INLINE Vector value(Vector z, Real) { return z; }
    static INLINE Vector grad(Vector dy, Vector, Real) { return dy; }
};

template <class Vector>
struct Formula<Activation::relu, Vector> {
    typedef LaneOf<Vector> Real;
    static INLINE Vector value(Vector z, Real) { return z <= 0 ? Vector{} : z; }
    static INLINE Vector grad(Vector dy, Vector z, Real) { return z <= 0 ? Vector{} : dy; }
};

template <class Vector>
struct Formula<Activation::relu6, Vector> {
    typedef LaneOf<Vector> Real;
    static INLINE Vector value(Vector z, Real) {
        const Vector top = Vector{} + Real(6), below = z <= 0 ? Vector{} : z;
        return below >= 6 ? top : below;
    }
    static INLINE Vector grad(Vector dy, Vector z, Real) {
        const Vector above = z <= 0 ? Vector{} : dy;
        return z >= 6 ? Vector{} : above;
    }
};

template <class Vector>
struct Formula<Activation::leaky_relu, Vector> {
    typedef LaneOf<Vector> Real;
    static INLINE Vector value(Vector z, Real slope) {
        const Vector sloped = z * slope;
        return z > 0 ? z : sloped;
    }
    static INLINE Vector grad(Vector dy, Vector z, Real slope) {
        const Vector sloped = dy * slope;
        return z > 0 ? dy : sloped;
    }
};

// z · sigmoid(z)
template <class Vector>
struct Formula<Activation::silu, Vector> {
    typedef LaneOf<Vector> Real;
    static INLINE Vector value(Vector z, Real) { return z * Sigmoid<Vector>(z).value; }
    static INLINE Vector grad(Vector dy, Vector z, Real) {
        const Sigmoid<Vector> gate(z);
        return dy * (gate.value * (Real(1) + z * gate.rest));
    }
};

// z · relu6(z + 3) / 6
template <class Vector>
struct Formula<Activation::hardswish, Vector> {
    typedef LaneOf<Vector> Real;
    static INLINE Vector value(Vector z, Real) {
        const Vector middle = z * (z + Real(3)) * Real(1.0 / 6.0), above = z >= 3 ? z : middle;
        return z <= -3 ? Vector{} : above;
    }
    static INLINE Vector grad(Vector dy, Vector z, Real) {
        const Vector middle = dy * (z * Real(1.0 / 3.0) + Real(0.5)), above = z < 3 ? middle : dy;
        return z <= -3 ? Vector{} : above;
    }
};

// z · Φ(z), with the normal distribution Φ(z) = 0.5 (1 + erf(z / sqrt(2)))
template <class Vector>
struct Formula<Activation::gelu, Vector> {
    typedef LaneOf<Vector> Real;
    static INLINE Vector value(Vector z, Real) { return z * distribution(z); }
    static INLINE Vector grad(Vector dy, Vector z, Real) {
        const Vector density = exponential(Real(-0.5) * z * z) * Real(0.39894228040143268);
        return dy * (distribution(z) + z * density);
    }

  private:
    static INLINE Vector distribution(Vector z) { return Real(0.5) + Real(0.5) * error_function(z * Real(0.70710678118654752)); }
};

// z · 0.5 (1 + tanh(u)) = z · sigmoid(2u), u = sqrt(2/π) (z + 0.044715 z³)
template <class Vector>
struct Formula<Activation::gelu_tanh, Vector> {
    typedef LaneOf<Vector> Real;
    static INLINE Vector value(Vector z, Real) { return z * gate_of(z).value; }
    static INLINE Vector grad(Vector dy, Vector z, Real) {
        const Sigmoid<Vector> gate = gate_of(z);
        const Vector slope_of_2u = twice + twice * Real(3 * 0.044715) * (z * z);
        return dy * (gate.value * (Real(1) + z * gate.rest * slope_of_2u));
    }

  private:
    static constexpr Real twice = Real(1.5957691216057308);  // 2 sqrt(2/π)
    static INLINE Sigmoid<Vector> gate_of(Vector z) { return Sigmoid<Vector>(z * (twice + twice * Real(0.044715) * (z * z))); }
};

// An activation that is known at compile time.
template <Activation kind>
struct Known {
    static constexpr int64_t unrolled = 8;  // vectors per iteration of a sum's loop, an even number
    static constexpr bool needs_z = kind != Activation::identity;

    explicit Known(const Task&) {}
    template <class Vector>
    INLINE Vector value(Vector z) const {
        return Formula<kind, Vector>::value(z, 0);
    }
    template <class Vector>
    INLINE Vector grad(Vector dy, Vector z) const {
        return Formula<kind, Vector>::grad(dy, z, 0);
    }
};

// Any activation, chosen by a switch whose branch never changes within a call. Those with e^x or erf are not inlined: in every loop they
// would take minutes to compile. A call writes all vector registers to memory, so the others would take up to 1.7 times as long by it.
template <class Vector>
struct AnyActivation {
    static constexpr int64_t unrolled = 2;
    static constexpr bool needs_z = true;
    const Activation kind;
    const LaneOf<Vector> slope;

    explicit AnyActivation(const Task& task) : kind(task.activation), slope((LaneOf<Vector>)task.slope) {}

    INLINE Vector value(Vector z) const {
        if (kind == Activation::identity) return Formula<Activation::identity, Vector>::value(z, slope);
        if (kind == Activation::relu) return Formula<Activation::relu, Vector>::value(z, slope);
        if (kind == Activation::relu6) return Formula<Activation::relu6, Vector>::value(z, slope);
        if (kind == Activation::leaky_relu) return Formula<Activation::leaky_relu, Vector>::value(z, slope);
        if (kind == Activation::hardswish) return Formula<Activation::hardswish, Vector>::value(z, slope);
        return other_value(z);
    }
    INLINE Vector grad(Vector dy, Vector z) const {
        if (kind == Activation::identity) return Formula<Activation::identity, Vector>::grad(dy, z, slope);
        if (kind == Activation::relu) return Formula<Activation::relu, Vector>::grad(dy, z, slope);
        if (kind == Activation::relu6) return Formula<Activation::relu6, Vector>::grad(dy, z, slope);
        if (kind == Activation::leaky_relu) return Formula<Activation::leaky_relu, Vector>::grad(dy, z, slope);
        if (kind == Activation::hardswish) return Formula<Activation::hardswish, Vector>::grad(dy, z, slope);
        return other_grad(dy, z);
    }

  private:
    NOINLINE Vector other_value(Vector z) const {
#define CASE(name) \
    case Activation::name: return Formula<Activation::name, Vector>::value(z, slope);
        switch (kind) { ACTIVATIONS(CASE) }
#undef CASE
        __builtin_unreachable();
    }
    NOINLINE Vector other_grad(Vector dy, Vector z) const {
#define CASE(name) \
    case Activation::name: return Formula<Activation::name, Vector>::grad(dy, z, slope);
        switch (kind) { ACTIVATIONS(CASE) }
#undef CASE
        __builtin_unreachable();
    }
};

}  // namespace
