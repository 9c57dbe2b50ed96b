// Vectors of 64 bytes: AVX-512 F, BW, DQ and VL, and BF16 in builds that have it.
#pragma once

// gcc 12 warns that its own _mm512_undefined_pd is uninitialized.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "simd/generic.h"

namespace {

struct Avx512 : Generic<Avx512> {
    // One instruction each; for __builtin_convertvector, gcc 12 generates up to eight.
    static INLINE Doubles widen(HalfOfFloats values) { return bits_as<Doubles>(_mm512_cvtps_pd(bits_as<__m256>(values))); }
    static INLINE HalfOfFloats narrow(Doubles values) { return bits_as<HalfOfFloats>(_mm512_cvtpd_ps(bits_as<__m512d>(values))); }
    static INLINE Words widen(Halves values) { return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(values))); }
    static INLINE Halves narrow(Words values) { return bits_as<Halves>(_mm512_cvtepi32_epi16(bits_as<__m512i>(values))); }
    static INLINE Ints widen(BytePerFloat values) { return bits_as<Ints>(_mm512_cvtepu8_epi32(bits_as<__m128i>(values))); }
    static INLINE Longs widen(BytePerDouble values) {
        return bits_as<Longs>(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(bits_as<int64_t>(values))));
    }

    // An intrinsic, because gcc contracts a masked a · b + c to one instruction in whole vectors only, so that partial vectors would also
    // round the product.
    template <class Vector>
    static INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
        if constexpr (sizeof(a[0]) == sizeof(float)) {
            return bits_as<Vector>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
        } else {
            return bits_as<Vector>(_mm512_fmadd_pd(bits_as<__m512d>(a), bits_as<__m512d>(b), bits_as<__m512d>(c)));
        }
    }
    // As a · 1 + b: the units that add also convert and are busy, while the units that multiply are idle.
    static INLINE Doubles plus(Doubles a, Doubles b) {
        Doubles one = Doubles{} + 1.0;
        asm("" : "+v"(one));  // without this, the compiler would drop the product
        return multiply_add(a, one, b);
    }
    static INLINE Doubles square_root(Doubles values) { return bits_as<Doubles>(_mm512_sqrt_pd(bits_as<__m512d>(values))); }
    using Generic::bounded;
    static INLINE Floats bounded(Floats values, float limit) {
        constexpr int smaller_magnitude_with_the_first_sign = 2;
        return bits_as<Floats>(_mm512_range_ps(bits_as<__m512>(values), _mm512_set1_ps(limit), smaller_magnitude_with_the_first_sign));
    }

    // Masked instructions: 7x7 planes end in one odd element.
    template <class Vector, class Element>
    static INLINE Vector load_partial(const Element* from, Partial lanes) {
        if constexpr (sizeof(Element) == 8) {
            return bits_as<Vector>(_mm512_maskz_loadu_pd((__mmask8)lanes.bits(), from));
        } else if constexpr (sizeof(Element) == 2) {
            return bits_as<Vector>(_mm256_maskz_loadu_epi16((__mmask16)lanes.bits(), from));
        } else if constexpr (sizeof(Vector) == 64) {
            return bits_as<Vector>(_mm512_maskz_loadu_ps((__mmask16)lanes.bits(), from));
        } else {
            return bits_as<Vector>(_mm256_maskz_loadu_ps((__mmask8)lanes.bits(), from));
        }
    }
    template <class Vector, class Element>
    static INLINE void store_partial(Element* to, Vector values, Partial lanes) {
        if constexpr (sizeof(Element) == 8) {
            _mm512_mask_storeu_pd(to, (__mmask8)lanes.bits(), bits_as<__m512d>(values));
        } else if constexpr (sizeof(Element) == 2) {
            _mm256_mask_storeu_epi16(to, (__mmask16)lanes.bits(), bits_as<__m256i>(values));
        } else if constexpr (sizeof(Vector) == 64) {
            _mm512_mask_storeu_ps(to, (__mmask16)lanes.bits(), bits_as<__m512>(values));
        } else {
            _mm256_mask_storeu_ps(to, (__mmask8)lanes.bits(), bits_as<__m256>(values));
        }
    }

    // `to` is aligned to Vector.
    static constexpr bool streams = true;
    template <class Vector>
    static INLINE void stream(void* to, Vector values) {
        if constexpr (sizeof(Vector) == 64) {
            _mm512_stream_si512((__m512i*)to, bits_as<__m512i>(values));
        } else {
            static_assert(sizeof(Vector) == 32, "a vector or half of one");
            _mm256_stream_si256((__m256i*)to, bits_as<__m256i>(values));
        }
    }
    // To be called by a thread that streamed, before another thread may read.
    static INLINE void flush() { _mm_sfence(); }

    // In 1 and 4 instructions instead of the generic 2 and 7: conversions take most of the time of a half-precision map.
    static INLINE Floats widen_bfloat16(Halves halves) {
        const __m512i words = _mm512_castsi256_si512(bits_as<__m256i>(halves));
        return bits_as<Floats>(_mm512_maskz_permutexvar_epi16(upper_words, bits_as<__m512i>(spread), words));
    }
    static INLINE Halves narrow_to_bfloat16(Floats values) {
#if defined(__AVX512BF16__)
        return bits_as<Halves>(_mm512_cvtneps_pbh(bits_as<__m512>(values)));  // subnormal numbers become 0
#else
        const __m512i bits = bits_as<__m512i>(values), one = _mm512_set1_epi32(1);
        __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
        rounded = _mm512_mask_add_epi32(rounded, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), rounded, one);
        return bits_as<Halves>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(bits_as<__m512i>(odd), rounded)));
#endif
    }

    static INLINE Floats widen_float16(Halves halves) { return bits_as<Floats>(_mm512_cvtph_ps(bits_as<__m256i>(halves))); }
    static INLINE Halves narrow_to_float16(Floats values) {
        return bits_as<Halves>(_mm512_cvtps_ph(bits_as<__m512>(values), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

  private:
    static constexpr __mmask32 upper_words = 0xaaaaaaaa;

    typedef uint16_t Places __attribute__((vector_size(64)));
    // Permutations of the 16-bit words of a vector: place i gets word i / 2 (`spread`) or word 2i + 1 (`odd`).
    static constexpr Places spread = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                                      8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
    static constexpr Places odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
};

}  // namespace
