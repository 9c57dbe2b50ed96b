// The activations of kernels/activation.py on vectors.
//
// At a kink and for NaN the results are torch's: the comparisons are written so that NaN takes the branch of positive numbers.
#pragma once

#include "api.h"
#include "simd/storage.h"

namespace {

using batchnorm::Activation;
using batchnorm::Task;

// e^x for |x| <= `exponent_limit`; what lies beyond is undefined, and so is NaN. e^x = 2^n · e^r, |r| <= ln(2) / 2, with a minimax
// polynomial of relative error 3e-9; the result is off by less than 1 ulp. 2^n · p is p with n added to its exponent.
INLINE Floats exponential(Floats x) {
    const float magic = 0x1.8p23f;  // added to a number, this leaves the nearest integer in the low bits
    const Floats shifted = x * 0x1.715476p0f + magic;
    const Floats n = shifted - magic;
    Floats r = x - n * 0x1.62e4p-1f;
    r = r - n * 0x1.7f7d1cp-20f;
    Floats p = r * 0x1.6a23d0p-10f + 0x1.123a20p-7f;
    p = p * r + 0x1.5558f2p-5f;
    p = p * r + 0x1.555492p-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return bits_as<Floats>(bits_as<Words>(p) + (bits_as<Words>(shifted) << 23));
}
// float64 calls the C library for each lane, which is slow.
INLINE Doubles exponential(Doubles x) {
    for (int lane = 0; lane < vector_bytes / 8; ++lane) x[lane] = exp(x[lane]);
    return x;
}

template <class Vector>
using LaneOf = __typeof__(Vector{}[0] + 0);

// Neither e^limit nor e^-limit overflows, or is subnormal.
template <class Vector>
constexpr LaneOf<Vector> exponent_limit = sizeof(LaneOf<Vector>) == sizeof(float) ? 86.6f : 708.0;

// The normal distribution Φ(z), and e^(-z²/2), from which float32 gets both: Φ(-|z|) = e^(-z²/2) · P(u), u = |z| / (4 + |z|), where P is a
// minimax polynomial: Φ is off by less than 4e-9 before rounding. From 13 on the power is 0. For NaN they are any numbers, as below.
template <class Vector>
struct Normal;

template <>
struct Normal<Floats> {
    Floats distribution, power;

    INLINE explicit Normal(Floats z) {
        const Floats near = Simd::bounded(z, 13.0f), magnitude = bits_as<Floats>(bits_as<Words>(near) & 0x7fffffffu);
        const Floats u = magnitude / (magnitude + 4.0f), e = exponential(near * -0.5f * near);
        power = near == z ? e : Floats{};
        Floats p = u * 0x1.6d9e08p-4f - 0x1.2eb710p-2f;
        p = p * u + 0x1.1bc52ep-3f;
        p = p * u + 0x1.badcd0p-1f;
        p = p * u - 0x1.0d8a14p+1f;
        p = p * u + 0x1.33bc90p+1f;
        p = p * u - 0x1.988448p+0f;
        p = p * u + 0.5f;
        const Floats tail = power * p;
        distribution = z < 0 ? tail : 1.0f - tail;
    }
};

template <>
struct Normal<Doubles> {
    Doubles distribution, power;

    INLINE explicit Normal(Doubles z) {
        for (int lane = 0; lane < vector_bytes / 8; ++lane) {
            distribution[lane] = 0.5 + 0.5 * erf(z[lane] * 0.70710678118654752);
            power[lane] = exp(-0.5 * z[lane] * z[lane]);
        }
    }
};

// sigmoid(z) and 1 - sigmoid(z), each to full precision, because the derivatives multiply the latter by z. Where e^-z is clamped they are
// set to 0 and 1, or 1 and 0, since z times the clamped value would grow again. For NaN they are any numbers: all formulas multiply by z.
template <class Vector>
struct Sigmoid {
    typedef LaneOf<Vector> Real;
    Vector value, rest;

    INLINE explicit Sigmoid(Vector z) {
        const Real limit = exponent_limit<Vector>;
        const Vector e = exponential(-Simd::bounded(z, limit)), inverse = Real(1) / (Real(1) + e);
        value = z < -limit ? Vector{} : inverse;
        const Vector below = z < -limit ? Vector{} + Real(1) : e * inverse;
        rest = z > limit ? Vector{} : below;
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

// z · Φ(z)
template <class Vector>
struct Formula<Activation::gelu, Vector> {
    typedef LaneOf<Vector> Real;
    static INLINE Vector value(Vector z, Real) { return z * Normal<Vector>(z).distribution; }
    static INLINE Vector grad(Vector dy, Vector z, Real) {
        const Normal<Vector> normal(z);
        return dy * (normal.distribution + z * normal.power * Real(0.39894228040143268));
    }
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

// The formulas on each of several vectors.
template <Activation kind, class Vector, int count, class Real>
INLINE Several<Vector, count> values_of(Several<Vector, count> z, Real slope) {
    UNROLLED
    for (int number = 0; number < count; ++number) z.at[number] = Formula<kind, Vector>::value(z.at[number], slope);
    return z;
}
template <Activation kind, class Vector, int count, class Real>
INLINE Several<Vector, count> grads_of(Several<Vector, count> dy, Several<Vector, count> z, Real slope) {
    UNROLLED
    for (int number = 0; number < count; ++number) dy.at[number] = Formula<kind, Vector>::grad(dy.at[number], z.at[number], slope);
    return dy;
}

// An activation that is known at compile time.
template <Activation kind>
struct Known {
    static constexpr int unrolled = 8;  // vectors per iteration of a sum's loop
    static constexpr int together = 1;  // vectors that are activated together
    static constexpr bool needs_z = kind != Activation::identity;

    explicit Known(const Task&) {}
    template <class Vector, int count>
    INLINE Several<Vector, count> values(Several<Vector, count> z) const {
        return values_of<kind>(z, LaneOf<Vector>(0));
    }
    template <class Vector, int count>
    INLINE Several<Vector, count> grads(Several<Vector, count> dy, Several<Vector, count> z) const {
        return grads_of<kind>(dy, z, LaneOf<Vector>(0));
    }
};

constexpr int activated_together = 4;  // vectors for which the general loops choose the activation once

// Any activation, chosen by branches that never change within a call. GELU, and SiLU of single vectors, are not inlined, because in every
// loop they would be most of the code. A call writes all vector registers to memory: by one, SiLU takes up to 1.4 times as long, and the
// short activations 1.7 times.
template <class Vector, int vectors_together>
struct AnyActivation {
    static constexpr int together = vectors_together, unrolled = together > 2 ? together : 2;
    static constexpr bool needs_z = true;
    const Activation kind;
    const LaneOf<Vector> slope;

    explicit AnyActivation(const Task& task) : kind(task.activation), slope((LaneOf<Vector>)task.slope) {}

    template <int count>
    INLINE Several<Vector, count> values(Several<Vector, count> z) const {
        if (kind == Activation::identity) return z;
        if (kind == Activation::relu) return values_of<Activation::relu>(z, slope);
        if (kind == Activation::relu6) return values_of<Activation::relu6>(z, slope);
        if (kind == Activation::leaky_relu) return values_of<Activation::leaky_relu>(z, slope);
        if (kind == Activation::hardswish) return values_of<Activation::hardswish>(z, slope);
        if constexpr (count > 1)
            if (kind == Activation::silu) return values_of<Activation::silu>(z, slope);
        UNROLLED
        for (int number = 0; number < count; ++number) z.at[number] = other_value(z.at[number]);
        return z;
    }
    template <int count>
    INLINE Several<Vector, count> grads(Several<Vector, count> dy, Several<Vector, count> z) const {
        if (kind == Activation::identity) return dy;
        if (kind == Activation::relu) return grads_of<Activation::relu>(dy, z, slope);
        if (kind == Activation::relu6) return grads_of<Activation::relu6>(dy, z, slope);
        if (kind == Activation::leaky_relu) return grads_of<Activation::leaky_relu>(dy, z, slope);
        if (kind == Activation::hardswish) return grads_of<Activation::hardswish>(dy, z, slope);
        if constexpr (count > 1)
            if (kind == Activation::silu) return grads_of<Activation::silu>(dy, z, slope);
        UNROLLED
        for (int number = 0; number < count; ++number) dy.at[number] = other_grad(dy.at[number], z.at[number]);
        return dy;
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
