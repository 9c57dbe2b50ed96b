// AVX2, with FMA and F16C: vectors of 32 bytes.
#pragma once

#include <immintrin.h>

#include "simd/generic.h"

namespace {

struct Avx2 : Generic<Avx2> {
    // One instruction each, for which gcc 12 writes up to eight when given __builtin_convertvector.
    static INLINE Doubles widen(HalfOfFloats values) { return bits_as<Doubles>(_mm256_cvtps_pd(bits_as<__m128>(values))); }
    static INLINE HalfOfFloats narrow(Doubles values) { return bits_as<HalfOfFloats>(_mm256_cvtpd_ps(bits_as<__m256d>(values))); }
    static INLINE Words widen(Halves values) { return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(values))); }
    static INLINE Halves narrow(Words values) {
        const __m256i words = bits_as<__m256i>(values);
        return bits_as<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
    // A shuffle moves the halves to where they belong in both directions: with widening and narrowing of integers it is a shift more each
    // way, and those wait for the shuffles' units.
    static INLINE Floats widen_bfloat16(Halves halves) {
        const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                                -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
        return bits_as<Floats>(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bits_as<__m128i>(halves)), places));
    }
    static INLINE Halves narrow_to_bfloat16(Floats values) {
        const __m256i places = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                                2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i halves = _mm256_shuffle_epi8(bits_as<__m256i>(rounded_to_bfloat16(values)), places);
        return bits_as<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0b1000)));
    }
    static INLINE Ints widen(BytePerFloat values) {
        return bits_as<Ints>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(values))));
    }
    static INLINE Longs widen(BytePerDouble values) {
        return bits_as<Longs>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bits_as<int32_t>(values))));
    }

    // An intrinsic, because gcc contracts a · b + c only where both operations stay in one basic block.
    template <class Vector>
    static INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
        if constexpr (sizeof(a[0]) == sizeof(float)) {
            return bits_as<Vector>(_mm256_fmadd_ps(bits_as<__m256>(a), bits_as<__m256>(b), bits_as<__m256>(c)));
        } else {
            return bits_as<Vector>(_mm256_fmadd_pd(bits_as<__m256d>(a), bits_as<__m256d>(b), bits_as<__m256d>(c)));
        }
    }
    static INLINE Doubles square_root(Doubles values) { return bits_as<Doubles>(_mm256_sqrt_pd(bits_as<__m256d>(values))); }
    using Generic::bounded;
    static INLINE Floats bounded(Floats values, float limit) {
        const __m256 below = _mm256_min_ps(bits_as<__m256>(values), _mm256_set1_ps(limit));
        return bits_as<Floats>(_mm256_max_ps(below, _mm256_set1_ps(-limit)));
    }

    // Masked stores take as long as the stack.
    template <class Vector, class Element>
    static INLINE Vector load_partial(const Element* from, Partial lanes) {
        if constexpr (sizeof(Element) == 8) {
            return bits_as<Vector>(_mm256_maskload_pd(from, bits_as<__m256i>(lanes_within<Longs>(lanes))));
        } else if constexpr (sizeof(Element) == 4 && sizeof(Vector) == 32) {
            return bits_as<Vector>(_mm256_maskload_ps(from, bits_as<__m256i>(lanes_within<Ints>(lanes))));
        } else {
            return Generic::load_partial<Vector>(from, lanes);
        }
    }

    static INLINE Floats widen_float16(Halves halves) { return bits_as<Floats>(_mm256_cvtph_ps(bits_as<__m128i>(halves))); }
    static INLINE Halves narrow_to_float16(Floats values) {
        return bits_as<Halves>(_mm256_cvtps_ph(bits_as<__m256>(values), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
};

}  // namespace
