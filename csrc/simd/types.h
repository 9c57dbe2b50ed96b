// Vectors of the widest kind that the target has, as the vector extensions that gcc and clang share.
//
// Everything in simd/ and kernels/ lives in an unnamed namespace: each instruction set's build must have its own copy, because a copy
// merged by the linker could bring AVX-512 to a processor without it. For the same reason nothing there uses std::.
#pragma once

#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda
#define NOINLINE __attribute__((noinline))      // compiled once, wherever it is called
#define UNROLLED _Pragma("GCC unroll 16")

// The target is the most capable one of which every extension that we use is there.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define TARGET_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define TARGET_AVX2
#endif

namespace {

#if defined(TARGET_AVX512)
constexpr int vector_bytes = 64;
#elif defined(TARGET_AVX2)
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

// The lanes of a vector that are used: all of them, or begin ... end - 1. The other lanes of a partial vector load as 0 and are not stored.
struct Whole {
    static constexpr bool is_whole = true;

    static constexpr int end_of(int width) { return width; }
};
struct Partial {
    static constexpr bool is_whole = false;
    int end, begin = 0;

    static INLINE Partial between(int begin, int end) { return {end, begin}; }
    int end_of(int) const { return end; }
    INLINE uint32_t bits() const { return (1u << end) - (1u << begin); }
};

template <class Mask>
INLINE Mask lanes_within(Partial lanes) {
    typedef __typeof__(Mask{}[0] + 0) Lane;
    Mask numbers;
    for (int lane = 0; lane < (int)(sizeof(Mask) / sizeof(Lane)); ++lane) numbers[lane] = lane;
    return (numbers >= (Lane)lanes.begin) & (numbers < (Lane)lanes.end);
}

// `values` in these lanes, `others` in the rest.
template <class Vector>
INLINE Vector within(Vector values, Vector, Whole) {
    return values;
}
INLINE Floats within(Floats values, Floats others, Partial lanes) { return lanes_within<Ints>(lanes) ? values : others; }
INLINE Doubles within(Doubles values, Doubles others, Partial lanes) { return lanes_within<Longs>(lanes) ? values : others; }

// Several vectors, or what belongs to each of them, for computations that are done side by side.
template <class Item, int count>
struct Several {
    Item at[count];
};
template <int count>
using Places = Several<int64_t, count>;  // indices of elements, at which vectors begin

template <int count>
INLINE Places<count> consecutive(int64_t first, int64_t step) {
    Places<count> places;
    UNROLLED
    for (int number = 0; number < count; ++number) places.at[number] = first + number * step;
    return places;
}

template <class To, class From>
INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class Vector>
INLINE Vector load_vector(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

// Prefetches a line into the second-level cache; the address need not be valid. The processor's own prefetching ends at
// each page of 4 KB: with ours the sums of 56x56 planes took 2.7 ns a line, without 5.5 ns, and into the first-level cache 5.6 ns.
INLINE void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }

}  // namespace
