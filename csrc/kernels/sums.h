// What the reductions add up, and how exactly: for each storage type the cheapest sums whose error nobody sees.
//
// float32: in float64, of which 29 digits are to spare. Products are exact there, and so the squares may be taken about zero, up to a
//     mean of 64 deviations, which costs 12 digits.
// half: the moments in float32 about a typical value of the channel, eight vectors at a time, whose sums are added in float64. Where that
//     overflows, at deviations beyond 1e19, or cancels, the sums are taken again as those of float32. The gradients' are always those: float32
//     parameters see what float32 products round.
// float64: about a typical value, and every sum keeps what its rounding loses: there is no digit to spare.
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

// What a reduction takes of a vector: Σ g and Σ g · x; Σ x and Σ x²; or Σ (x - center) and Σ (x - center)². In the first, x is
// x - mean unless `grads_about_zero`, which saves the sums of large tensors a subtraction in float64.
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

// Takes up to eight vectors in a row, which belong to the even or to the odd sums by their number.
template <class S>
struct EvenAndOdd {
    S &even, &odd;

    template <class Term, class Center>
    INLINE void add(const Term& term, Center center, int64_t number) {
        (number % 2 ? odd : even).add(term, center);
    }
    INLINE void end() {}
};

// Both sums, lane by lane, and what adds a `Block` of vectors to them.
template <class T>
struct Sums {
    typedef EvenAndOdd<Sums> Block;  // of the first moments
    static constexpr bool about_zero = true, grads_about_zero = true, may_overflow = false;
    static constexpr double worst_cancellation = 4096.0;  // Σx² / M2, from where the sums are taken again about the mean
    static constexpr int64_t vectors_together = 1;        // that are added up before they join the others

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

    struct Block {
        Sums<Float32> &all, &unused;
        Floats value = {}, product = {};

        INLINE void add(DeviationTermValues<Floats> term, Floats center, int64_t) {
            const Floats d = term.x - center;
            value += d, product += d * d;
        }
        INLINE void end() {
            const Wide values(value), products(product);
            all.value[0] += values.low, all.value[1] += values.high;
            all.product[0] += products.low, all.product[1] += products.high;
        }
    };
};
template <>
struct Sums<BFloat16> : SumsOfHalfPrecision {};
template <>
struct Sums<Float16> : SumsOfHalfPrecision {};

// A sum that keeps what its rounding loses (Knuth's two-sum).
template <class Real>
struct ExactSum {
    Real sum = {}, lost = {};

    INLINE void add(Real term) {
        const Real next = sum + term, added = next - sum;
        lost += (sum - (next - added)) + (term - added);
        sum = next;
    }
    INLINE void add(const ExactSum& other) {
        add(other.sum);
        lost += other.lost;
    }
    // Of the lanes of a vector.
    INLINE double total() const {
        ExactSum<double> all;
        for (int lane = 0; lane < vector_bytes / 8; ++lane) all.add(sum[lane]);
        for (int lane = 0; lane < vector_bytes / 8; ++lane) all.lost += lost[lane];
        return all.sum + all.lost;
    }
};

// With the rounding of x - mean and of the sums kept, they are as good as torch's at any mean and scale.
template <>
struct Sums<Float64> {
    typedef EvenAndOdd<Sums> Block;
    static constexpr bool about_zero = false, grads_about_zero = false, may_overflow = false;
    static constexpr double worst_cancellation = 1.0001;  // the mean, K + a rounded number, would feel more
    static constexpr int64_t vectors_together = 1;

    ExactSum<Doubles> value, product;

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
    typedef EvenAndOdd<Sums> Block;
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

// Sums of neighbors, of which each vector has kept what it lost.
INLINE double total_of(const double* values, int64_t count) {
    ExactSum<Doubles> lanes;
    int64_t i = 0;
    for (; i + vector_bytes / 8 <= count; i += vector_bytes / 8) lanes.add(load_vector<Doubles>(values + i));
    ExactSum<double> rest;
    for (; i < count; ++i) rest.add(values[i]);
    return total(lanes.sum) + (rest.sum + (total(lanes.lost) + rest.lost));
}

}  // namespace
