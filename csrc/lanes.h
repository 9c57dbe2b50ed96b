// Vectors of the widest kind that the target has, in the vector extensions that gcc and clang share; intrinsics only where those
// have no word for it: stores around the cache, partial loads, half precision.
//
// A storage type (Float32, ExactFloat32, Float64, BFloat16, Float16) loads and stores `width` elements as one Vector of Real; half precision is
// computed in float32. Everything lives in an unnamed namespace: each instruction set's build must keep its own copy, because a
// copy merged by the linker could bring AVX-512 to a processor without it. For the same reason nothing here uses std::.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda
#define NOINLINE __attribute__((noinline))      // what is compiled once, wherever it is called
#define UNROLLED _Pragma("GCC unroll 16")

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr int cache_line = 64;

typedef float Floats __attribute__((vector_size(vector_bytes)));
typedef int32_t Ints __attribute__((vector_size(vector_bytes)));
typedef uint32_t Words __attribute__((vector_size(vector_bytes)));
typedef double Doubles __attribute__((vector_size(vector_bytes)));
typedef int64_t Longs __attribute__((vector_size(vector_bytes)));
typedef float HalfOfFloats __attribute__((vector_size(vector_bytes / 2)));
typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));
typedef uint8_t BytePerFloat __attribute__((vector_size(vector_bytes / 4)));
typedef uint8_t BytePerDouble __attribute__((vector_size(vector_bytes / 8)));

// How much of a vector is meant: all of it, or lanes begin ... end - 1 (the others load as 0 and are not stored).
struct Whole {
    static constexpr bool is_whole = true;
};
struct Some {
    static constexpr bool is_whole = false;
    int end, begin = 0;

    static INLINE Some between(int begin, int end) { return {end, begin}; }
    INLINE uint32_t bits() const { return (1u << end) - (1u << begin); }
};

template <class Mask>
INLINE Mask lanes_within(Some some) {
    typedef __typeof__(Mask{}[0] + 0) Lane;
    Mask lanes;
    for (int lane = 0; lane < (int)(sizeof(Mask) / sizeof(Lane)); ++lane) lanes[lane] = lane;
    return (lanes >= (Lane)some.begin) & (lanes < (Lane)some.end);
}

template <class To, class From>
INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Conversions are one instruction each, for which gcc 12 writes up to eight where it is asked for a __builtin_convertvector.
INLINE Doubles widen(HalfOfFloats values) {
#if defined(__AVX512F__)
    return bits_as<Doubles>(_mm512_cvtps_pd(bits_as<__m256>(values)));
#elif defined(__AVX__)
    return bits_as<Doubles>(_mm256_cvtps_pd(bits_as<__m128>(values)));
#else
    return __builtin_convertvector(values, Doubles);
#endif
}
INLINE HalfOfFloats narrow(Doubles values) {
#if defined(__AVX512F__)
    return bits_as<HalfOfFloats>(_mm512_cvtpd_ps(bits_as<__m512d>(values)));
#elif defined(__AVX__)
    return bits_as<HalfOfFloats>(_mm256_cvtpd_ps(bits_as<__m256d>(values)));
#else
    return __builtin_convertvector(values, HalfOfFloats);
#endif
}
INLINE Words widen(Halves values) {
#if defined(__AVX512F__)
    return bits_as<Words>(_mm512_cvtepu16_epi32(bits_as<__m256i>(values)));
#elif defined(__AVX2__)
    return bits_as<Words>(_mm256_cvtepu16_epi32(bits_as<__m128i>(values)));
#else
    return __builtin_convertvector(values, Words);
#endif
}
// Of values below 2^16.
INLINE Halves narrow(Words values) {
#if defined(__AVX512F__)
    return bits_as<Halves>(_mm512_cvtepi32_epi16(bits_as<__m512i>(values)));
#elif defined(__AVX2__)
    const __m256i words = bits_as<__m256i>(values);
    return bits_as<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
    return __builtin_convertvector(values, Halves);
#endif
}
INLINE Ints widen(BytePerFloat values) {
#if defined(__AVX512F__)
    return bits_as<Ints>(_mm512_cvtepu8_epi32(bits_as<__m128i>(values)));
#elif defined(__AVX2__)
    return bits_as<Ints>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(values))));
#else
    return __builtin_convertvector(values, Ints);
#endif
}
INLINE Longs widen(BytePerDouble values) {
#if defined(__AVX512F__)
    return bits_as<Longs>(_mm512_cvtepu8_epi64(_mm_cvtsi64_si128(bits_as<int64_t>(values))));
#elif defined(__AVX2__)
    return bits_as<Longs>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bits_as<int32_t>(values))));
#else
    return __builtin_convertvector(values, Longs);
#endif
}

// a · b + c in one rounding, where it is selected from: gcc makes a masked sum of such a one, in whole vectors but not in partial ones,
// and its product is rounded then.
template <class Vector>
INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(a[0]) == sizeof(float)) {
        return bits_as<Vector>(_mm512_fmadd_ps(bits_as<__m512>(a), bits_as<__m512>(b), bits_as<__m512>(c)));
    } else {
        return bits_as<Vector>(_mm512_fmadd_pd(bits_as<__m512d>(a), bits_as<__m512d>(b), bits_as<__m512d>(c)));
    }
#else
    return a * b + c;
#endif
}

// The largest float32 for what is infinite. What becomes of NaN depends on the processor.
INLINE Floats bounded(Floats values) {
    constexpr float largest = 0x1.fffffep127f;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    constexpr int smaller_magnitude_with_the_first_sign = 2;
    return bits_as<Floats>(_mm512_range_ps(bits_as<__m512>(values), _mm512_set1_ps(largest), smaller_magnitude_with_the_first_sign));
#elif defined(__AVX2__)
    const __m256 below = _mm256_min_ps(bits_as<__m256>(values), _mm256_set1_ps(largest));
    return bits_as<Floats>(_mm256_max_ps(below, _mm256_set1_ps(-largest)));
#else
    const Floats below = values > largest ? Floats{} + largest : values;
    return below < -largest ? Floats{} - largest : below;
#endif
}

// a + b, as a · 1 + b: the units that add are also those that convert, and wait while those that multiply are idle.
INLINE Doubles plus(Doubles a, Doubles b) {
#if defined(__AVX512F__)
    Doubles one = Doubles{} + 1.0;
    asm("" : "+v"(one));  // or the compiler would see through it
    return multiply_add(a, one, b);
#else
    return a + b;
#endif
}

INLINE Doubles square_root(Doubles values) {
#if defined(__AVX512F__)
    return bits_as<Doubles>(_mm512_sqrt_pd(bits_as<__m512d>(values)));
#elif defined(__AVX__)
    return bits_as<Doubles>(_mm256_sqrt_pd(bits_as<__m256d>(values)));
#else
    for (int lane = 0; lane < vector_bytes / 8; ++lane) values[lane] = sqrt(values[lane]);
    return values;
#endif
}

template <class Vector>
INLINE Vector load_vector(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

// Around the cache: the line is not read before it is written, which saves a third of a map's traffic. `to` is aligned to Vector.
template <class Vector>
INLINE void stream_vector(void* to, Vector vector) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Vector) == 64) return _mm512_stream_si512((__m512i*)to, bits_as<__m512i>(vector));
#endif
#if defined(__AVX__)
    if constexpr (sizeof(Vector) == 32) return _mm256_stream_si256((__m256i*)to, bits_as<__m256i>(vector));
#endif
#if defined(__x86_64__)
    if constexpr (sizeof(Vector) == 16) return _mm_stream_si128((__m128i*)to, bits_as<__m128i>(vector));
#endif
    memcpy(to, &vector, sizeof vector);
}

// Asks the second-level cache for a line that will be read soon; the address may be anything. The processor's own prefetching ends at
// each page of 4 KB: with ours the sums of 56x56 planes took 2.7 ns a line, without 5.5, and asking the first-level cache 5.6.
INLINE void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// To be called by a thread that streamed, before another may read.
INLINE void end_streaming() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// Partial loads and stores go through the stack, but for AVX-512, which has masked ones (7x7 planes end in one odd element), and for
// the loads of AVX2; its masked stores take as long.
template <class Storage>
NOINLINE typename Storage::Vector load_through_stack(const typename Storage::Element* from, Some some) {
    typename Storage::Element buffer[Storage::width] = {};
    for (int lane = some.begin; lane < some.end; ++lane) buffer[lane] = from[lane];
    return Storage::load(buffer, Whole{});
}

template <class Storage>
NOINLINE void store_through_stack(typename Storage::Element* to, typename Storage::Vector values, Some some) {
    typename Storage::Element buffer[Storage::width];
    Storage::store(buffer, values, Whole{});
    for (int lane = some.begin; lane < some.end; ++lane) to[lane] = buffer[lane];
}

struct Float32 {
    typedef float Element;
    typedef float Real;
    typedef Floats Vector;
    typedef Ints Mask;
    typedef BytePerFloat Bytes;
    static constexpr bool is_common = true, rounds_scale = true;
    static constexpr int width = vector_bytes / sizeof(Real);

    static INLINE Vector load(const Element* from, Whole) { return load_vector<Vector>(from); }
    static INLINE void store(Element* to, Vector values, Whole) { memcpy(to, &values, sizeof values); }
    static INLINE void stream(Element* to, Vector values) { stream_vector(to, values); }
#if defined(__AVX512F__)
    static INLINE Vector load(const Element* from, Some some) {
        return bits_as<Vector>(_mm512_maskz_loadu_ps((__mmask16)some.bits(), from));
    }
    static INLINE void store(Element* to, Vector values, Some some) {
        _mm512_mask_storeu_ps(to, (__mmask16)some.bits(), bits_as<__m512>(values));
    }
#else
#if defined(__AVX2__)
    static INLINE Vector load(const Element* from, Some some) {
        return bits_as<Vector>(_mm256_maskload_ps(from, bits_as<__m256i>(lanes_within<Ints>(some))));
    }
#else
    static INLINE Vector load(const Element* from, Some some) { return load_through_stack<Float32>(from, some); }
#endif
    static INLINE void store(Element* to, Vector values, Some some) {
        store_through_stack<Float32>(to, values, some);
    }
#endif
};

struct Float64 {
    typedef double Element;
    typedef double Real;
    typedef Doubles Vector;
    typedef Longs Mask;
    typedef BytePerDouble Bytes;
    static constexpr bool is_common = false, rounds_scale = false;
    static constexpr int width = vector_bytes / sizeof(Real);

    static INLINE Vector load(const Element* from, Whole) { return load_vector<Vector>(from); }
    static INLINE void store(Element* to, Vector values, Whole) { memcpy(to, &values, sizeof values); }
    static INLINE void stream(Element* to, Vector values) { stream_vector(to, values); }
#if defined(__AVX512F__)
    static INLINE Vector load(const Element* from, Some some) {
        return bits_as<Vector>(_mm512_maskz_loadu_pd((__mmask8)some.bits(), from));
    }
    static INLINE void store(Element* to, Vector values, Some some) {
        _mm512_mask_storeu_pd(to, (__mmask8)some.bits(), bits_as<__m512d>(values));
    }
#else
#if defined(__AVX2__)
    static INLINE Vector load(const Element* from, Some some) {
        return bits_as<Vector>(_mm256_maskload_pd(from, bits_as<__m256i>(lanes_within<Longs>(some))));
    }
#else
    static INLINE Vector load(const Element* from, Some some) { return load_through_stack<Float64>(from, some); }
#endif
    static INLINE void store(Element* to, Vector values, Some some) {
        store_through_stack<Float64>(to, values, some);
    }
#endif
    static INLINE Vector rounded(Vector values) { return values; }
};

// float32 elements computed in float64: for calls so small that their arithmetic costs nothing, and for processors that cannot
// round a · b + c once, where three roundings of float32 are more than torch's two.
struct ExactFloat32 {
    typedef float Element;
    typedef double Real;
    typedef Doubles Vector;
    typedef Longs Mask;
    typedef BytePerDouble Bytes;
    static constexpr bool is_common = false, rounds_scale = false;
    static constexpr int width = Float64::width;

    static INLINE Vector load(const Element* from, Whole) {
        return widen(load_vector<HalfOfFloats>(from));
    }
    static INLINE void store(Element* to, Vector values, Whole) {
        const HalfOfFloats halves = narrow(values);
        memcpy(to, &halves, sizeof halves);
    }
    static INLINE void stream(Element* to, Vector values) {
        stream_vector(to, narrow(values));
    }
#if defined(__AVX512VL__)
    static INLINE Vector load(const Element* from, Some some) {
        return widen(bits_as<HalfOfFloats>(_mm256_maskz_loadu_ps((__mmask8)some.bits(), from)));
    }
    static INLINE void store(Element* to, Vector values, Some some) {
        _mm256_mask_storeu_ps(to, (__mmask8)some.bits(), bits_as<__m256>(narrow(values)));
    }
#else
    static INLINE Vector load(const Element* from, Some some) {
        return load_through_stack<ExactFloat32>(from, some);
    }
    static INLINE void store(Element* to, Vector values, Some some) {
        store_through_stack<ExactFloat32>(to, values, some);
    }
#endif
    static INLINE Vector rounded(Vector values) { return widen(narrow(values)); }
};

// How numbers that are kept as Real are loaded and stored as float64.
template <class Real>
struct InFloat64;
template <>
struct InFloat64<float> {
    typedef ExactFloat32 Storage;
};
template <>
struct InFloat64<double> {
    typedef Float64 Storage;
};

// What the 16-bit types share: loads and stores of bits; Format says what the bits mean.
template <class Format>
struct Half {
    typedef uint16_t Element;
    typedef float Real;
    typedef Floats Vector;
    typedef Ints Mask;
    typedef BytePerFloat Bytes;
    static constexpr bool is_common = Format::is_common;
    static constexpr bool rounds_scale = false;  // by less than the elements are rounded
    static constexpr int width = vector_bytes / sizeof(Real);

    static INLINE Vector load(const Element* from, Whole) { return Format::widen(load_vector<Halves>(from)); }
    static INLINE void store(Element* to, Vector values, Whole) {
        const Halves halves = Format::narrow(values);
        memcpy(to, &halves, sizeof halves);
    }
    static INLINE void stream(Element* to, Vector values) { stream_vector(to, Format::narrow(values)); }
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    static INLINE Vector load(const Element* from, Some some) {
        return Format::widen(bits_as<Halves>(_mm256_maskz_loadu_epi16((__mmask16)some.bits(), from)));
    }
    static INLINE void store(Element* to, Vector values, Some some) {
        _mm256_mask_storeu_epi16(to, (__mmask16)some.bits(), bits_as<__m256i>(Format::narrow(values)));
    }
#else
    static INLINE Vector load(const Element* from, Some some) { return load_through_stack<Half>(from, some); }
    static INLINE void store(Element* to, Vector values, Some some) { store_through_stack<Half>(to, values, some); }
#endif
};

// The upper half of a float32, rounded to nearest even.
struct BFloat16Format {
    static constexpr bool is_common = true;
#if defined(__AVX512BW__)
    // In 1 and in 6 instructions, for the 2 and 11 of the plain ones: they are most of what a map of half precision takes.
    static INLINE Floats widen(Halves halves) {
        const __m512i words = _mm512_castsi256_si512(bits_as<__m256i>(halves));
        return bits_as<Floats>(_mm512_maskz_permutexvar_epi16(upper_words, bits_as<__m512i>(spread), words));
    }
    static INLINE Halves narrow(Floats values) {
#if defined(__AVX512BF16__)
        return bits_as<Halves>(_mm512_cvtneps_pbh(bits_as<__m512>(values)));  // what is subnormal becomes 0
#else
        const __m512 floats = bits_as<__m512>(values);
        const __m512i bits = bits_as<__m512i>(values), one = _mm512_set1_epi32(1);
        __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
        rounded = _mm512_mask_add_epi32(rounded, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000)), rounded, one);
        const __mmask16 nan = _mm512_cmp_ps_mask(floats, floats, _CMP_UNORD_Q);
        rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
        return bits_as<Halves>(_mm512_castsi512_si256(_mm512_permutexvar_epi16(bits_as<__m512i>(odd), rounded)));
#endif
    }

  private:
    static constexpr __mmask32 upper_words = 0xaaaaaaaa;

    typedef uint16_t Places __attribute__((vector_size(64)));
    // Of the words of a vector: word i / 2 at place i, and word 2i + 1.
    static constexpr Places spread = {0, 0, 1, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
                                      8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
    static constexpr Places odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
#else
    static INLINE Floats widen(Halves halves) { return bits_as<Floats>(::widen(halves) << 16); }
    static INLINE Halves narrow(Floats values) {
        const Words bits = bits_as<Words>(values);
        const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Words quiet_nan = (bits >> 16) | 0x40u;
        return ::narrow((Words)(values != values ? quiet_nan : rounded));
    }
#endif
};

// IEEE binary16: instructions where there are some, otherwise bits (after F. Giesen, "Float->half variants", public domain).
struct Float16Format {
    static constexpr bool is_common = false;
#if defined(__AVX512F__)
    static INLINE Floats widen(Halves halves) { return bits_as<Floats>(_mm512_cvtph_ps(bits_as<__m256i>(halves))); }
    static INLINE Halves narrow(Floats values) {
        return bits_as<Halves>(_mm512_cvtps_ph(bits_as<__m512>(values), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#elif defined(__F16C__)
    static INLINE Floats widen(Halves halves) { return bits_as<Floats>(_mm256_cvtph_ps(bits_as<__m128i>(halves))); }
    static INLINE Halves narrow(Floats values) {
        return bits_as<Halves>(_mm256_cvtps_ph(bits_as<__m256>(values), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
#elif defined(__aarch64__)
    typedef __fp16 Binary16 __attribute__((vector_size(vector_bytes / 2)));
    static INLINE Floats widen(Halves halves) { return __builtin_convertvector(bits_as<Binary16>(halves), Floats); }
    static INLINE Halves narrow(Floats values) { return bits_as<Halves>(__builtin_convertvector(values, Binary16)); }
#else
    static INLINE Floats widen(Halves halves) {
        const Words bits = ::widen(halves);
        const Floats scaled = bits_as<Floats>((bits & 0x7fffu) << 13) * 0x1p112f;  // exact, subnormal numbers too
        const Words magnitude = bits_as<Words>(scaled);
        const Words special = magnitude | 0x7f800000u;
        return bits_as<Floats>((Words)((bits & 0x7c00u) == 0x7c00u ? special : magnitude) | ((bits & 0x8000u) << 16));
    }
    static INLINE Halves narrow(Floats values) {
        const Words bits = bits_as<Words>(values), magnitude = bits & 0x7fffffffu;
        const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        const Words subnormal = bits_as<Words>(bits_as<Floats>(magnitude) + 0.5f) - 0x3f000000u;
        const Words special = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;
        const Words finite = magnitude < 0x38800000u ? subnormal : normal;
        const Words half = magnitude >= 0x47800000u ? special : finite;
        return ::narrow(half | ((bits ^ magnitude) >> 16));
    }
#endif
};

typedef Half<BFloat16Format> BFloat16;
typedef Half<Float16Format> Float16;

// How many lanes are meant.
template <class Storage>
INLINE int lanes_of_part(Whole) {
    return Storage::width;
}
template <class Storage>
INLINE int lanes_of_part(Some some) {
    return some.end;
}

// The lanes meant of `values`; of `others` the rest.
template <class Vector>
INLINE Vector within(Vector values, Vector, Whole) {
    return values;
}
INLINE Floats within(Floats values, Floats others, Some some) { return lanes_within<Ints>(some) ? values : others; }
INLINE Doubles within(Doubles values, Doubles others, Some some) { return lanes_within<Longs>(some) ? values : others; }

// Which lanes count, from one byte each.
template <class Storage>
INLINE typename Storage::Mask lanes_of(const uint8_t* counted, Whole) {
    return widen(load_vector<typename Storage::Bytes>(counted)) != 0;
}
template <class Storage>
INLINE typename Storage::Mask lanes_of(const uint8_t* counted, Some some) {
    uint8_t buffer[Storage::width] = {};
    for (int lane = some.begin; lane < some.end; ++lane) buffer[lane] = counted[lane];
    return lanes_of<Storage>(buffer, Whole{});
}

// A Vector's lanes in float64, in order.
template <class Vector>
struct Wide;

template <>
struct Wide<Floats> {
    Doubles low, high;

    INLINE explicit Wide(Floats values) {
        HalfOfFloats halves[2];
        memcpy(halves, &values, sizeof values);
        low = widen(halves[0]), high = widen(halves[1]);
    }
};

INLINE double total(Doubles lanes) {
    double sum = 0.0;
    for (int lane = 0; lane < vector_bytes / 8; ++lane) sum += lanes[lane];
    return sum;
}

}  // namespace
