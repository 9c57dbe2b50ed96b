// The operations that instruction sets do differently, for any processor: in vector extensions, and in intrinsics of x86-64's
// baseline (SSE2) or types of aarch64 where the extensions have none. avx2.h and avx512.h override what they do better.
#pragma once

#include <math.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "simd/types.h"

namespace {

// `Target` is the struct that overrides.
template <class Target>
struct Generic {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    static constexpr bool multiply_add_rounds_once = true;
#else
    static constexpr bool multiply_add_rounds_once = false;
#endif

    static INLINE Doubles widen(HalfOfFloats values) { return __builtin_convertvector(values, Doubles); }
    static INLINE HalfOfFloats narrow(Doubles values) { return __builtin_convertvector(values, HalfOfFloats); }
    static INLINE Words widen(Halves values) { return __builtin_convertvector(values, Words); }
    // Of values below 2^16.
    static INLINE Halves narrow(Words values) { return __builtin_convertvector(values, Halves); }
    static INLINE Ints widen(BytePerFloat values) { return __builtin_convertvector(values, Ints); }
    static INLINE Longs widen(BytePerDouble values) { return __builtin_convertvector(values, Longs); }

    // a · b + c, in one rounding where the processor can.
    template <class Vector>
    static INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
        return a * b + c;
    }
    // a + b, where it stands among conversions.
    static INLINE Doubles plus(Doubles a, Doubles b) { return a + b; }
    static INLINE Doubles square_root(Doubles values) {
        for (int lane = 0; lane < vector_bytes / 8; ++lane) values[lane] = sqrt(values[lane]);
        return values;
    }
    // The limit, with the sign of the value, in place of values beyond it. The result for NaN depends on the processor.
    template <class Vector, class Real>
    static INLINE Vector bounded(Vector values, Real limit) {
        const Vector below = values > limit ? Vector{} + limit : values;
        return below < -limit ? Vector{} - limit : below;
    }

    // Partial loads and stores go through the stack.
    template <class Vector, class Element>
    static NOINLINE Vector load_partial(const Element* from, Partial lanes) {
        Element buffer[sizeof(Vector) / sizeof(Element)] = {};
        for (int lane = lanes.begin; lane < lanes.end; ++lane) buffer[lane] = from[lane];
        return load_vector<Vector>(buffer);
    }
    template <class Vector, class Element>
    static NOINLINE void store_partial(Element* to, Vector values, Partial lanes) {
        Element buffer[sizeof(Vector) / sizeof(Element)];
        memcpy(buffer, &values, sizeof buffer);
        for (int lane = lanes.begin; lane < lanes.end; ++lane) to[lane] = buffer[lane];
    }

    // Whether large outputs are written around the cache: the line is not read before it is written, which saves a third of a map's
    // traffic. Only where one store writes a whole line: with two stores for a line, AVX2's maps took 1.5 to 5 times as long (EPYC).
    static constexpr bool streams = false;
    template <class Vector>
    static INLINE void stream(void* to, Vector values) {
        memcpy(to, &values, sizeof values);
    }
    static INLINE void flush() {}

    // bfloat16 is the upper half of a float32, rounded to nearest even. No carry reaches the upper half of a NaN, since the lower is 0: the
    // processor's own NaN is so, and arithmetic keeps that of an operand, which is bfloat16 or a channel's number (channels.h).
    static INLINE Floats widen_bfloat16(Halves halves) { return bits_as<Floats>(Target::widen(halves) << 16); }
    static INLINE Halves narrow_to_bfloat16(Floats values) { return Target::narrow(rounded_to_bfloat16(values) >> 16); }
    // The upper halves are the result.
    static INLINE Words rounded_to_bfloat16(Floats values) {
        const Words bits = bits_as<Words>(values);
        return bits + 0x7fffu + ((bits >> 16) & 1u);
    }

    // IEEE binary16: instructions where there are some, otherwise bits (after F. Giesen, "Float->half variants", public domain).
#if defined(__aarch64__)
    typedef __fp16 Binary16 __attribute__((vector_size(vector_bytes / 2)));
    static INLINE Floats widen_float16(Halves halves) { return __builtin_convertvector(bits_as<Binary16>(halves), Floats); }
    static INLINE Halves narrow_to_float16(Floats values) { return bits_as<Halves>(__builtin_convertvector(values, Binary16)); }
#else
    static INLINE Floats widen_float16(Halves halves) {
        const Words bits = Target::widen(halves);
        const Floats scaled = bits_as<Floats>((bits & 0x7fffu) << 13) * 0x1p112f;  // exact, subnormal numbers too
        const Words magnitude = bits_as<Words>(scaled);
        const Words special = magnitude | 0x7f800000u;
        return bits_as<Floats>((Words)((bits & 0x7c00u) == 0x7c00u ? special : magnitude) | ((bits & 0x8000u) << 16));
    }
    static INLINE Halves narrow_to_float16(Floats values) {
        const Words bits = bits_as<Words>(values), magnitude = bits & 0x7fffffffu;
        const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        const Words subnormal = bits_as<Words>(bits_as<Floats>(magnitude) + 0.5f) - 0x3f000000u;
        const Words special = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
        const Words finite = magnitude < 0x38800000u ? subnormal : normal;
        const Words half = magnitude >= 0x47800000u ? special : finite;
        return Target::narrow(half | ((bits ^ magnitude) >> 16));
    }
#endif
};

struct Baseline : Generic<Baseline> {};

}  // namespace
