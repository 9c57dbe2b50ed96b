// The storage types: how elements in memory become vectors to compute with, and back. Each loads, stores and streams `width` elements as
// one Vector of Real. Half precision is computed in float32.
#pragma once

#include "simd/types.h"
#if defined(TARGET_AVX512)
#include "simd/avx512.h"
#elif defined(TARGET_AVX2)
#include "simd/avx2.h"
#else
#include "simd/generic.h"
#endif

namespace {

#if defined(TARGET_AVX512)
typedef Avx512 Simd;
#elif defined(TARGET_AVX2)
typedef Avx2 Simd;
#else
typedef Baseline Simd;
#endif

// The vectors of each Real, and the masks that select among their lanes.
struct InFloats {
    typedef float Real;
    typedef Floats Vector;
    typedef Ints Mask;
    typedef BytePerFloat Bytes;
    static constexpr int width = vector_bytes / sizeof(Real);
};
struct InDoubles {
    typedef double Real;
    typedef Doubles Vector;
    typedef Longs Mask;
    typedef BytePerDouble Bytes;
    static constexpr int width = vector_bytes / sizeof(Real);
};

// A conversion says how a vector of elements, `InMemory`, becomes a Vector (`widen`), and back (`narrow`).
template <class Conversion>
struct Storage : Conversion::Computed {
    typedef typename Conversion::Element Element;
    typedef typename Conversion::InMemory InMemory;
    typedef typename Conversion::Computed Numbers;
    typedef typename Numbers::Vector Vector;

    static INLINE Vector load(const Element* from, Whole) { return Conversion::widen(load_vector<InMemory>(from)); }
    static INLINE Vector load(const Element* from, Partial lanes) { return Conversion::widen(Simd::load_partial<InMemory>(from, lanes)); }
    static INLINE double load_one(const Element* from) {
        InMemory values = {};
        values[0] = *from;
        return (double)Conversion::widen(values)[0];
    }
    static INLINE void store(Element* to, Vector values, Whole) {
        const InMemory narrow = Conversion::narrow(values);
        memcpy(to, &narrow, sizeof narrow);
    }
    static INLINE void store(Element* to, Vector values, Partial lanes) { Simd::store_partial(to, Conversion::narrow(values), lanes); }
    static INLINE void stream(Element* to, Vector values) { Simd::stream(to, Conversion::narrow(values)); }
    // The values that a store and a load leave.
    static INLINE Vector rounded(Vector values) { return Conversion::widen(Conversion::narrow(values)); }
};

template <class Numbers>
struct Unchanged {
    typedef typename Numbers::Real Element;
    typedef typename Numbers::Vector InMemory;
    typedef Numbers Computed;
    static INLINE InMemory widen(InMemory values) { return values; }
    static INLINE InMemory narrow(InMemory values) { return values; }
};
struct FloatsAsDoubles {
    typedef float Element;
    typedef HalfOfFloats InMemory;
    typedef InDoubles Computed;
    static INLINE Doubles widen(HalfOfFloats values) { return Simd::widen(values); }
    static INLINE HalfOfFloats narrow(Doubles values) { return Simd::narrow(values); }
};
struct BFloat16AsFloats {
    typedef uint16_t Element;
    typedef Halves InMemory;
    typedef InFloats Computed;
    static INLINE Floats widen(Halves halves) { return Simd::widen_bfloat16(halves); }
    static INLINE Halves narrow(Floats values) { return Simd::narrow_to_bfloat16(values); }
};
struct Float16AsFloats {
    typedef uint16_t Element;
    typedef Halves InMemory;
    typedef InFloats Computed;
    static INLINE Floats widen(Halves halves) { return Simd::widen_float16(halves); }
    static INLINE Halves narrow(Floats values) { return Simd::narrow_to_float16(values); }
};

// `is_common`: the frequent activations have loops of their own. `rounds_scale`: what rounding the scale to Real loses shows in the
// outputs; half precision rounds its elements by more.
struct Float32 : Storage<Unchanged<InFloats>> {
    static constexpr bool is_common = true, rounds_scale = true;
};
struct Float64 : Storage<Unchanged<InDoubles>> {
    static constexpr bool is_common = false, rounds_scale = false;
};
// float32 elements computed in float64: for calls so small that their arithmetic costs nothing, and for processors that cannot
// round a · b + c once, where three roundings of float32 are more than torch's two.
struct ExactFloat32 : Storage<FloatsAsDoubles> {
    static constexpr bool is_common = false, rounds_scale = false;
};
struct BFloat16 : Storage<BFloat16AsFloats> {
    static constexpr bool is_common = true, rounds_scale = false;
};
struct Float16 : Storage<Float16AsFloats> {
    static constexpr bool is_common = false, rounds_scale = false;
};

// Numbers of type Real in memory, loaded and stored as float64.
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

// The lanes whose byte is not 0.
template <class Storage>
INLINE typename Storage::Mask lanes_of(const uint8_t* bytes, Whole) {
    return Simd::widen(load_vector<typename Storage::Bytes>(bytes)) != 0;
}
template <class Storage>
INLINE typename Storage::Mask lanes_of(const uint8_t* bytes, Partial lanes) {
    uint8_t buffer[Storage::width] = {};
    for (int lane = lanes.begin; lane < lanes.end; ++lane) buffer[lane] = bytes[lane];
    return lanes_of<Storage>(buffer, Whole{});
}

}  // namespace
