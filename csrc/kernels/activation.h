// The activations of kernels/activation.py on vectors: `value(z)`, and `grad(dy, z)` = dy · activation'(z).
//
// At a kink and for NaN the results are torch's: the comparisons are written so that NaN takes the branch of positive numbers.
#pragma once

#include "api.h"
#include "simd/storage.h"

namespace {

using batchnorm::Activation;
using batchnorm::Task;

struct Identity {
    static constexpr int64_t unrolled = 8;  // vectors of a sum's loop, an even number
    static constexpr bool needs_z = false;
    explicit Identity(const Task&) {}
    template <class Vector>
    INLINE Vector value(Vector z) const {
        return z;
    }
    template <class Vector>
    INLINE Vector grad(Vector dy, Vector) const {
        return dy;
    }
};

struct Relu {
    static constexpr int64_t unrolled = 8;
    static constexpr bool needs_z = true;
    explicit Relu(const Task&) {}
    template <class Vector>
    INLINE Vector value(Vector z) const {
        return z <= 0 ? Vector{} : z;
    }
    template <class Vector>
    INLINE Vector grad(Vector dy, Vector z) const {
        return z <= 0 ? Vector{} : dy;
    }
};

// e^x = 2^n · e^r, |r| <= ln(2) / 2, with the polynomial of Cephes' expf: the error is below 2 ulp of float32. x is clamped at 88.3, before
// the result overflows; below -87.3, before the result becomes subnormal, it is 0; NaN stays NaN.
INLINE Floats exponential(Floats x) {
    const auto vanishes = x < -87.3f;
    x = x > 88.3f ? Floats{} + 88.3f : x;
    x = vanishes ? Floats{} : x;
    const float magic = 0x1.8p23f;  // added to a number it leaves the nearest integer in the low bits
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

// float64 calls the C library for each lane, which is slow; clamped for the same reasons.
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

// Any activation, chosen by a switch whose branch never changes within a call. All but identity and relu are not inlined: with e^x in
// every loop the library would take minutes to compile.
template <class Vector>
struct AnyActivation {
    static constexpr int64_t unrolled = 2;
    typedef __typeof__(Vector{}[0] + 0) Real;
    static constexpr bool needs_z = true;
    Activation kind;
    Real slope;

    explicit AnyActivation(const Task& task) : kind(task.activation), slope((Real)task.slope) {}

    // sigmoid(z) and 1 - sigmoid(z), each to full precision, because the derivatives multiply the latter by z. They are 0 and 1 where e^-z is
    // clamped: z times the clamped value would grow again.
    struct Sigmoid {
        Vector value, rest;

        INLINE explicit Sigmoid(Vector z) {
            const Vector e = exponential(-z);
            const auto far = z < Real(sizeof(Real) == 4 ? -88.3 : -708);
            value = Real(1) / (Real(1) + e);
            rest = far ? Vector{} + Real(1) : e * value;
            value = far ? Vector{} : value;
        }
    };
    // 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)
    static INLINE Sigmoid tanh_gate(Vector z) {
        const Real twice = Real(1.5957691216057308);
        return Sigmoid(z * (twice + twice * Real(0.044715) * (z * z)));
    }
    static INLINE Vector normal_distribution(Vector z) {
        return Real(0.5) + Real(0.5) * error_function(z * Real(0.70710678118654752));
    }

    INLINE Vector value(Vector z) const {
        if (kind == Activation::identity) return z;
        if (kind == Activation::relu) return z <= 0 ? Vector{} : z;
        return other_value(z);
    }
    INLINE Vector grad(Vector dy, Vector z) const {
        if (kind == Activation::identity) return dy;
        if (kind == Activation::relu) return z <= 0 ? Vector{} : dy;
        return other_grad(dy, z);
    }

  private:
    NOINLINE Vector other_value(Vector z) const {
        switch (kind) {
            case Activation::relu6: {
                const Vector top = Vector{} + Real(6), below = z <= 0 ? Vector{} : z;
                return below >= 6 ? top : below;
            }
            case Activation::leaky_relu: {
                const Vector sloped = z * slope;
                return z > 0 ? z : sloped;
            }
            case Activation::silu: return z * Sigmoid(z).value;
            case Activation::hardswish: {
                const Vector middle = z * (z + Real(3)) * Real(1.0 / 6.0), above = z >= 3 ? z : middle;
                return z <= -3 ? Vector{} : above;
            }
            case Activation::gelu: return z * normal_distribution(z);
            default: return z * tanh_gate(z).value;
        }
    }

    NOINLINE Vector other_grad(Vector dy, Vector z) const {
        switch (kind) {
            case Activation::relu6: {
                const Vector above = z <= 0 ? Vector{} : dy;
                return z >= 6 ? Vector{} : above;
            }
            case Activation::leaky_relu: {
                const Vector sloped = dy * slope;
                return z > 0 ? dy : sloped;
            }
            case Activation::silu: {
                const Sigmoid gate(z);
                return dy * (gate.value * (Real(1) + z * gate.rest));
            }
            case Activation::hardswish: {
                const Vector middle = dy * (z * Real(1.0 / 3.0) + Real(0.5)), above = z < 3 ? middle : dy;
                return z <= -3 ? Vector{} : above;
            }
            case Activation::gelu: {
                const Vector density = exponential(Real(-0.5) * z * z) * Real(0.39894228040143268);
                return dy * (normal_distribution(z) + z * density);
            }
            default: {
                const Sigmoid gate = tanh_gate(z);
                const Real twice = Real(1.5957691216057308);
                const Vector slope_of_u = twice + twice * Real(3 * 0.044715) * (z * z);
                return dy * (gate.value * (Real(1) + z * gate.rest * slope_of_u));
            }
        }
    }
};

}  // namespace
