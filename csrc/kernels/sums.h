// The sums that the reductions compute. Each storage type has the cheapest ones whose error does not show in the results.
//
// float32: float64 sums. float64 has 29 bits more than float32, so products are exact, and squares may be taken about zero. Subtracting
//     the squared mean then cancels up to 12 bits, at a mean of 64 standard deviations; beyond that the sums are computed again about the
//     mean.
// half precision: the moments are float32 sums about a typical value of the channel over eight vectors at a time; these are added up in
//     float64. Where they overflow (deviations beyond 1e19) or cancel, the sums are computed again as for float32. The sums of gradients
//     are always those of float32, because rounded products would show in the gradients of float32 parameters.
// float64: compensated sums about a typical value, because float64 has no bits to spare.
#pragma once

#include "simd/storage.h"

namespace {

constexpr int64_t vectors_of_block = 8;

// The lanes of a vector of float32 in float64, in order.
struct Wide {
    Doubles low, high;

    INLINE explicit Wide(Floats values) {
        HalfOfFloats halves[2];
        memcpy(halves, &values, sizeof values);
        low = Simd::widen(halves[0]), high = Simd::widen(halves[1]);
    }
};

INLINE double total(Doubles lanes) {
    double sum = 0.0;
    for (int lane = 0; lane < vector_bytes / 8; ++lane) sum += lanes[lane];
    return sum;
}

// The terms that a reduction adds for one vector, which also name the sums: Σ g and Σ g · x; Σ x and Σ x²; or Σ (x - center) and
// Σ (x - center)². In the first, x stands for x - mean unless `grads_about_zero`, which saves a subtraction in float64.
template <class Vector>
struct GradTermValues {
    Vector g, x;
};
template <class Vector>
struct SquareTermValues {
    Vector x;
};
template <class Vector>
struct DeviationTermValues {
    Vector x;
};

template <class T>
struct Sums;

// Adds up to eight consecutive vectors, alternately to two sums, so that an addition need not wait for the one before it.
template <class T>
struct EvenAndOdd {
    Sums<T>&even, &odd;

    template <class Term, class Center>
    INLINE void add(const Term& term, Center center, int64_t number) {
        (number % 2 ? odd : even).add(term, center);
    }
    INLINE void flush() {}
};

// The two sums of a reduction in each lane.
template <>
struct Sums<Float32> {
    static constexpr bool about_zero = true, grads_about_zero = true, may_overflow = false;
    static constexpr double worst_cancellation = 4096.0;  // Σx² / M2, above which the sums are computed again about the mean
    static constexpr int64_t vectors_together = 1;        // added up in one block before they join the other sums

    Doubles value[2] = {}, product[2] = {};

    INLINE void add(SquareTermValues<Floats> term, Floats) {
        const Wide x(term.x);
        value[0] = Simd::plus(x.low, value[0]), value[1] = Simd::plus(x.high, value[1]);
        product[0] += x.low * x.low, product[1] += x.high * x.high;
    }
    INLINE void add(DeviationTermValues<Floats> term, Floats center) {
        const Wide x(term.x), wide(center);
        const Doubles low = x.low - wide.low, high = x.high - wide.high;
        value[0] += low, value[1] += high;
        product[0] += low * low, product[1] += high * high;
    }
    INLINE void add(GradTermValues<Floats> term, Floats) {
        const Wide g(term.g), x(term.x);
        value[0] = Simd::plus(g.low, value[0]), value[1] = Simd::plus(g.high, value[1]);
        product[0] += g.low * x.low, product[1] += g.high * x.high;
    }
    INLINE void add(const Sums& other) {
        for (int half = 0; half < 2; ++half) value[half] += other.value[half], product[half] += other.product[half];
    }
    INLINE double total_value() const { return total(value[0] + value[1]); }
    INLINE double total_product() const { return total(product[0] + product[1]); }
    // Lane by lane.
    INLINE void unpack(double* values, double* products) const {
        memcpy(values, value, sizeof value);
        memcpy(products, product, sizeof product);
    }
};

struct SumsOfHalfPrecision : Sums<Float32> {
    static constexpr bool about_zero = false, may_overflow = true;
    static constexpr double worst_cancellation = 16.0;
    static constexpr int64_t vectors_together = vectors_of_block;
};
template <>
struct Sums<BFloat16> : SumsOfHalfPrecision {};
template <>
struct Sums<Float16> : SumsOfHalfPrecision {};

// Adds up to eight consecutive vectors in float32, and then their sum to the sums.
struct InFloat32 {
    Sums<Float32>&all, &unused;
    Floats value = {}, product = {};

    INLINE void add(DeviationTermValues<Floats> term, Floats center, int64_t) {
        const Floats d = term.x - center;
        value += d, product += d * d;
    }
    INLINE void flush() {
        const Wide values(value), products(product);
        all.value[0] += values.low, all.value[1] += values.high;
        all.product[0] += products.low, all.product[1] += products.high;
    }
};

// How moments are added, the first time and `again`.
template <class T, bool again>
struct BlockOfMoments {
    typedef EvenAndOdd<T> Type;
};
template <>
struct BlockOfMoments<BFloat16, false> {
    typedef InFloat32 Type;
};
template <>
struct BlockOfMoments<Float16, false> {
    typedef InFloat32 Type;
};

// A compensated sum: `lost` adds up the rounding errors of `sum` (Knuth's two-sum).
template <class Real>
struct CompensatedSum {
    Real sum = {}, lost = {};

    INLINE void add(Real term) {
        const Real next = sum + term, added = next - sum;
        lost += (sum - (next - added)) + (term - added);
        sum = next;
    }
    INLINE void add(const CompensatedSum& other) {
        add(other.sum);
        lost += other.lost;
    }
    // The sum over the lanes of a vector.
    INLINE double total() const {
        CompensatedSum<double> all;
        for (int lane = 0; lane < vector_bytes / 8; ++lane) all.add(sum[lane]);
        for (int lane = 0; lane < vector_bytes / 8; ++lane) all.lost += lost[lane];
        return all.sum + all.lost;
    }
};

// The rounding errors of x - center are compensated too: so the moments are as accurate as torch's at any mean and scale.
template <>
struct Sums<Float64> {
    static constexpr bool about_zero = false, grads_about_zero = false, may_overflow = false;
    static constexpr double worst_cancellation = 1.0001;  // more would show in the mean, which is K plus a rounded number
    static constexpr int64_t vectors_together = 1;

    CompensatedSum<Doubles> value, product;

    INLINE void add(DeviationTermValues<Doubles> term, Doubles center) {
        const Doubles d = term.x - center, taken = term.x - d;
        value.add(d);
        value.lost += (term.x - (d + taken)) + (taken - center);
        product.add(d * d);
    }
    INLINE void add(GradTermValues<Doubles> term, Doubles) {
        value.add(term.g);
        product.add(term.g * term.x);
    }
    INLINE void add(const Sums& other) {
        value.add(other.value);
        product.add(other.product);
    }
    INLINE double total_value() const { return value.total(); }
    INLINE double total_product() const { return product.total(); }
    INLINE void unpack(double* values, double* products) const {
        const Doubles all_of_value = value.sum + value.lost, all_of_product = product.sum + product.lost;
        memcpy(values, &all_of_value, sizeof all_of_value);
        memcpy(products, &all_of_product, sizeof all_of_product);
    }
};

template <>
struct Sums<ExactFloat32> {
    static constexpr bool about_zero = true, grads_about_zero = false, may_overflow = false;
    static constexpr double worst_cancellation = Sums<Float32>::worst_cancellation;
    static constexpr int64_t vectors_together = 1;

    Doubles value = {}, product = {};

    INLINE void add(SquareTermValues<Doubles> term, Doubles) { value += term.x, product += term.x * term.x; }
    INLINE void add(DeviationTermValues<Doubles> term, Doubles center) {
        const Doubles d = term.x - center;
        value += d, product += d * d;
    }
    INLINE void add(GradTermValues<Doubles> term, Doubles) { value += term.g, product += term.g * term.x; }
    INLINE void add(const Sums& other) { value += other.value, product += other.product; }
    INLINE double total_value() const { return total(value); }
    INLINE double total_product() const { return total(product); }
    INLINE void unpack(double* values, double* products) const {
        memcpy(values, &value, sizeof value);
        memcpy(products, &product, sizeof product);
    }
};

// The compensated sum of `count` consecutive values.
INLINE double total_of(const double* values, int64_t count) {
    CompensatedSum<Doubles> lanes;
    int64_t i = 0;
    for (; i + vector_bytes / 8 <= count; i += vector_bytes / 8) lanes.add(load_vector<Doubles>(values + i));
    CompensatedSum<double> rest;
    for (; i < count; ++i) rest.add(values[i]);
    return total(lanes.sum) + (rest.sum + (total(lanes.lost) + rest.lost));
}

}  // namespace
