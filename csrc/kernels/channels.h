// The algebra between the reductions and the maps: how each channel's sums become the numbers that the loops of the maps use. It is
// computed in float64.
//
// With m the mean rounded to Real (float32, or float64 for float64 tensors) and d = x - m, the loops compute
//
//     z  = d · scale + (d · scale_rest + offset)
//          scale + scale_rest = rstd · weight        offset = bias - (mean - m) · scale
//     dx = g · grad_scale + ((d · rstd) · slope + level)
//
//          grad_scale = rstd · weight        slope = -grad_scale · mean(g·x̂)
//          level = -grad_scale · mean(g) - slope · rstd · (mean - m)
//
// The mean is subtracted first, and the offset corrects for the rounding of m, so a mean of 1e4 costs no accuracy; x · scale + offset,
// one operation shorter, is off by 5e-4 standard deviations there. scale_rest corrects for the rounding of the scale to float32: without
// it y is off by up to 1.5 units in the last place, with it by up to 1. d · rstd is a product of its own because rstd · slope underflows
// in float32 for |x| = 1e25.
//
// Moments are sums about a shift K, which is 0 or a typical value of the channel (sums.h), the same for all its blocks:
//
//     mean = K + Σ(x-K) / n                M2 = Σ(x-K)² - (Σ(x-K))² / n
//
// If K is so far from the mean that the difference cancels more bits than the sums can spare, they are computed again with K = mean.
// Division is the last step, so sums of integers stay exact. The sums of float32 and float64 tensors are float64, as torch's are. Float32
// sums could not match torch's results: sums of only eight terms put dbias off by 0.2 units in the last place, while torch's is correctly
// rounded. Float64 sums of float32 values also cannot overflow or underflow.
//
// Batch renormalization (kernels/correction.py) replaces weight by r · weight and bias by d · weight + bias as soon as mean and M2 are
// known, so x is read once.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "api.h"
#include "kernels/sums.h"

namespace {

using batchnorm::Task;
using batchnorm::Verb;

constexpr INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
constexpr INLINE int64_t at_least(int64_t value, int64_t limit) { return value > limit ? value : limit; }
INLINE int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

INLINE bool goes_forward(const Task& task) {
    return task.verb == Verb::moments || task.verb == Verb::normalize || task.verb == Verb::forward;
}

// The mask of a call that computes sums; null for a map alone, which needs no list of the positions that count. Listing them takes 20 ms
// for a mask of 1.3 million scattered positions, while the map of one channel takes 0.6 ms.
INLINE const uint8_t* mask_of_sums(const Task& task) {
    return task.verb == Verb::normalize || task.verb == Verb::input_grad ? nullptr : task.mask;
}

// The numbers of a channel that the loops use: of one channel in every lane (planar), or of one channel per lane (interleaved).
template <class Vector>
struct Channel {
    Vector mean, scale, scale_rest, offset, grad_scale, rstd, slope, level;
};

// The numbers of `one` in these lanes, of `other` in the rest.
template <class Vector>
INLINE Channel<Vector> joined(const Channel<Vector>& one, const Channel<Vector>& other, Partial lanes) {
    const auto both = [&](Vector Channel<Vector>::* number) { return within(one.*number, other.*number, lanes); };
    typedef Channel<Vector> Numbers;
    return {both(&Numbers::mean),       both(&Numbers::scale), both(&Numbers::scale_rest), both(&Numbers::offset),
            both(&Numbers::grad_scale), both(&Numbers::rstd),  both(&Numbers::slope),      both(&Numbers::level)};
}

// The numbers of many channels, stored as one array for each number. A place of the arrays belongs to a channel, or to a column of a
// matrix in which every column belongs to a channel.
template <class T>
class Table {
  public:
    typedef typename T::Real Real;
    typedef typename T::Vector Vector;
    typedef Storage<Unchanged<typename T::Numbers>> Stored;
    enum Number { mean, scale, scale_rest, offset, grad_scale, rstd, slope, level, all_numbers };

    // One vector past the end may be loaded; its values are not used.
    explicit Table(int64_t places) : places(places), stride(divide_up(places + T::width, line) * line) {
        values = (Real*)aligned_alloc(cache_line, all_numbers * stride * sizeof(Real));
    }
    // Places c0 ... c1 - 1 of another table, each repeated `copies` times: all numbers, or the four that sums and a forward need.
    Table(const Table& other, int64_t c0, int64_t c1, int64_t copies, bool all) : Table((c1 - c0) * copies) {
        for (int number = 0; number < (all ? all_numbers : grad_scale); ++number)
            for (int64_t c = c0; c < c1; ++c) {
                const Vector value = Vector{} + other.at(number, c);
                // The last vector reaches into the next channel, which overwrites it, or past the end.
                for (int64_t copy = 0; copy < copies; copy += T::width) memcpy(&at(number, (c - c0) * copies + copy), &value, sizeof value);
            }
    }
    ~Table() { free(values); }
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;

    Real& at(int number, int64_t place) { return values[number * stride + place]; }
    Real at(int number, int64_t place) const { return values[number * stride + place]; }

    // The numbers of one place in every lane.
    INLINE Channel<Vector> of(int64_t place) const {
        const auto all = [&](int number) { return Vector{} + at(number, place); };
        return {all(mean), all(scale), all(scale_rest), all(offset), all(grad_scale), all(rstd), all(slope), all(level)};
    }
    // The numbers of consecutive places, one per lane.
    INLINE Channel<Vector> from(int64_t place) const {
        const auto each = [&](int number) { return load_vector<Vector>(values + number * stride + place); };
        return {each(mean), each(scale), each(scale_rest), each(offset), each(grad_scale), each(rstd), each(slope), each(level)};
    }

    const int64_t places;

  private:
    static constexpr int64_t line = cache_line / sizeof(Real);
    const int64_t stride;
    Real* values;
};

// The algebra for the channels of one call, a vector of them at a time: where channels have few values, this is most of the arithmetic.
template <class T>
class Channels {
  public:
    typedef typename T::Real Real;

    // The table holds `copies` of each channel, `C` apart, for the interleaved loops, which join several rows.
    Channels(const Task& task, int64_t copies) : task(task), copies(copies), table(task.C * copies) { unfinished = (bool*)malloc(task.C); }
    ~Channels() { free(unfinished); }
    Channels(const Channels&) = delete;
    Channels& operator=(const Channels&) = delete;

    // Call this before the sums of channels c0 ... c1 - 1 are computed; typical(c) is a value near the mean of c.
    template <class Typical>
    void begin(int64_t c0, int64_t c1, const Typical& typical) {
        if (!begins_with_shifts(c0, c1)) return;
        for (int64_t c = c0; c < c1; ++c) set_shift(c, Doubles{} + typical(c), Partial{1});
    }
    // The same for all channels where neighbors in memory are channels: typicals(c, lanes) are those of a vector of channels.
    template <class Typicals>
    void begin_columns(const Typicals& typicals) {
        if (!begins_with_shifts(0, task.C)) return;
        int64_t c = 0;
        for (; c + T::width <= task.C; c += T::width) set_shifts(c, typicals(c, Whole{}), Whole{});
        const Partial rest{(int)(task.C - c)};
        if (c < task.C) set_shifts(c, typicals(c, rest), rest);
    }

    // Computes the numbers of channels c0 ... c1 - 1 from their sums. Returns whether some channels are unfinished: their sums must be
    // computed again, about a better K. Sums that were computed `again` leave no channel unfinished.
    bool finish(int64_t c0, int64_t c1, const double* values, const double* products, bool again) {
        bool more = false;
        for_lanes(c0, c1, [&](int64_t c, auto lanes) {
            const Doubles value = Float64::load(values + (c - c0), lanes), product = Float64::load(products + (c - c0), lanes);
            if (takes_moments()) {
                more |= finish_moments(c, value, product, again, lanes);
            } else {
                finish_grads(c, value, product, lanes);
            }
        });
        return more;
    }
    bool is_unfinished(int64_t c) const { return unfinished[c]; }

    // Call this before a map without sums, whose statistics are given.
    void set_all() {
        for_lanes(0, task.C, [&](int64_t c, auto lanes) {
            if (task.verb == Verb::normalize) {
                if (task.running_var) set_constants(c, lanes);
                return set_normalize(c, Doubles{}, lanes);
            }
            set_pre_activation(c, lanes);
            const auto given = [&](const double* values) { return values ? Float64::load(values + c, lanes) : Doubles{}; };
            set_input_grad(c, given(task.mean_grad), given(task.mean_grad_xhat), lanes);
        });
    }

    // The median of four values: typical even if most of a channel is 0; exact if all four are equal.
    template <class Value>
    static INLINE Value middle(Value a, Value b, Value c, Value d) {
        const auto lower = [](Value one, Value other) { return one < other ? one : other; };
        const auto higher = [](Value one, Value other) { return one < other ? other : one; };
        const Value low = higher(lower(a, b), lower(c, d)), high = lower(higher(a, b), higher(c, d));
        const Value half_of_low = low * (Value{} + 0.5), half_of_high = high * (Value{} + 0.5);
        return half_of_low + half_of_high;
    }

    const Task& task;
    const int64_t copies;
    Table<T> table;

  private:
    typedef Table<T> Numbers;
    typedef typename InFloat64<Real>::Storage Stored;
    bool* unfinished;

    bool takes_moments() const { return task.verb == Verb::moments || task.verb == Verb::forward; }

    // Whether the sums of channels c0 ... c1 - 1 need their shifts first; those of a backward get their numbers here.
    bool begins_with_shifts(int64_t c0, int64_t c1) {
        if (takes_moments()) return !Sums<T>::about_zero;
        for_lanes(c0, c1, [&](int64_t c, auto lanes) { set_pre_activation(c, lanes); });
        return false;
    }

    // Calls body(c, Whole) for each full vector of channels, and body(c, Partial) for the rest.
    template <class Body>
    static INLINE void for_lanes(int64_t c, int64_t c1, const Body& body) {
        for (; c + Float64::width <= c1; c += Float64::width) body(c, Whole{});
        if (c < c1) body(c, Partial{(int)(c1 - c)});
    }

    // A NaN among the numbers of half precision is that of the processor: conversions to bfloat16 rely on its lower half (generic.h).
    template <class Lanes>
    void set(int number, int64_t c, Doubles values, Lanes lanes) {
        if constexpr (sizeof(typename T::Element) == 2) values = values == values ? values : Doubles{} + __builtin_nan("");
        for (int64_t copy = 0; copy < copies; ++copy) Stored::store(&table.at(number, copy * task.C + c), values, lanes);
    }
    template <class Lanes>
    static Doubles load(const batchnorm::ChannelVector& from, int64_t c, Lanes lanes) {
        return from.is_float32 ? ExactFloat32::load((const float*)from.values + c, lanes)
                               : Float64::load((const double*)from.values + c, lanes);
    }
    template <class Lanes>
    Doubles given_weight(int64_t c, Lanes lanes) const {
        return task.weight ? load(task.weight, c, lanes) : Doubles{} + 1.0;
    }
    // The weight and the bias, renormalized where r and d are given: r · weight and d · weight + bias.
    template <class Lanes>
    Doubles weight_of(int64_t c, Lanes lanes) const {
        const Doubles weight = given_weight(c, lanes);
        return task.r ? Float64::load(task.r + c, lanes) * weight : weight;
    }
    template <class Lanes>
    Doubles bias_of(int64_t c, Lanes lanes) const {
        const Doubles bias = task.bias ? load(task.bias, c, lanes) : Doubles{};
        return task.d ? Float64::load(task.d + c, lanes) * given_weight(c, lanes) + bias : bias;
    }
    template <class Lanes>
    Doubles scale_of(int64_t c, Lanes lanes) const {
        return Float64::load(task.rstd + c, lanes) * weight_of(c, lanes);
    }
    // The rounding error of the values as Real; 0 where Real overflows.
    static Doubles rounding_error_of(Doubles values) {
        const Doubles rest = values - Stored::rounded(values);
        return rest - rest == 0.0 ? rest : Doubles{};
    }
    template <class Lanes>
    Doubles rounding_error_of_mean(int64_t c, Lanes lanes) const {
        const Doubles mean = Float64::load(task.mean + c, lanes);
        return mean - Stored::rounded(mean);
    }

    // Takes mean and rstd from the running statistics.
    template <class Lanes>
    void set_constants(int64_t c, Lanes lanes) {
        Float64::store(task.mean + c, load(task.running_mean, c, lanes), lanes);
        Float64::store(task.rstd + c, 1.0 / Simd::square_root(load(task.running_var, c, lanes) + task.eps), lanes);
    }

    // Stores K in place of the mean; 0 if K is not finite.
    template <class Lanes>
    void set_shift(int64_t c, Doubles shift, Lanes lanes) {
        set(Numbers::mean, c, shift - shift == 0.0 ? shift : Doubles{}, lanes);
    }

    template <class Lanes>
    void set_shifts(int64_t c, typename T::Vector shifts, Lanes lanes) {
        const typename T::Vector finite = shifts - shifts == (Real)0 ? shifts : typename T::Vector{};
        for (int64_t copy = 0; copy < copies; ++copy) Numbers::Stored::store(&table.at(Numbers::mean, copy * task.C + c), finite, lanes);
    }

    // `rest` is the rounding error of the mean in float64, which matters only for float64 tensors.
    template <class Lanes>
    void set_normalize(int64_t c, Doubles rest, Lanes lanes) {
        const Doubles scale = scale_of(c, lanes);
        set(Numbers::mean, c, Float64::load(task.mean + c, lanes), lanes);
        set(Numbers::scale, c, scale, lanes);
        set(Numbers::scale_rest, c, rounding_error_of(scale), lanes);
        set(Numbers::offset, c, bias_of(c, lanes) - (rounding_error_of_mean(c, lanes) + rest) * scale, lanes);
    }

    // Sets the numbers from which z is recomputed for the derivative of the activation. If y is given in place of the residual, z = y, so
    // scale and offset are 0.
    template <class Lanes>
    void set_pre_activation(int64_t c, Lanes lanes) {
        set_normalize(c, Doubles{}, lanes);
        if (!task.residual_is_output) return;
        set(Numbers::scale, c, Doubles{}, lanes), set(Numbers::scale_rest, c, Doubles{}, lanes);
        set(Numbers::offset, c, Doubles{}, lanes);
    }

    template <class Lanes>
    bool finish_moments(int64_t c, Doubles sum, Doubles squares, bool again, Lanes lanes) {
        const Doubles shift = Sums<T>::about_zero && !again ? Doubles{} : Stored::load(&table.at(Numbers::mean, c), lanes);
        const double count = task.count > 0.0 ? task.count : 1.0;
        const Doubles distance = sum / count, mean = shift + distance;
        Doubles m2 = squares - sum * distance;
        m2 = m2 < 0.0 ? Doubles{} : m2;
        Longs cancels = squares > Sums<T>::worst_cancellation * m2;
        if (Sums<T>::may_overflow) cancels |= squares - squares != 0.0;
        Float64::store(task.mean + c, mean, lanes);
        Float64::store(task.m2 + c, m2, lanes);
        if (task.verb == Verb::forward) {
            const Doubles sigma = Simd::square_root(m2 / count + task.eps);
            Float64::store(task.rstd + c, 1.0 / sigma, lanes);
            if (task.r) set_correction(c, mean, sigma, lanes);
            const Doubles taken = mean - shift;
            set_normalize(c, (shift - (mean - taken)) + (distance - taken), lanes);
        }
        if (again) return false;
        bool more = false;
        for (int lane = 0; lane < lanes.end_of(Float64::width); ++lane) more |= unfinished[c + lane] = cancels[lane] != 0;
        if (!more) return false;
        for (int lane = 0; lane < lanes.end_of(Float64::width); ++lane)
            if (unfinished[c + lane]) set_shift(c + lane, Doubles{} + mean[lane], Partial{1});
        return true;
    }

    template <class Lanes>
    void set_correction(int64_t c, Doubles mean, Doubles sigma, Lanes lanes) {
        const auto clip = [](Doubles value, double low, double high) {  // NaN stays NaN
            const Doubles raised = value < low ? Doubles{} + low : value;
            return raised > high ? Doubles{} + high : raised;
        };
        const Doubles running_rstd = 1.0 / Simd::square_root(load(task.running_var, c, lanes) + task.eps);
        const Doubles distance = mean - load(task.running_mean, c, lanes);
        Float64::store(task.r + c, clip(sigma * running_rstd, 1.0 / task.r_max, task.r_max), lanes);
        Float64::store(task.d + c, clip(distance * running_rstd, -task.d_max, task.d_max), lanes);
    }

    // Sums about zero have bits to spare: a mean of 1e6 standard deviations costs float32 no accuracy. Otherwise the terms are g · (x - m).
    template <class Lanes>
    void finish_grads(int64_t c, Doubles sum, Doubles product, Lanes lanes) {
        const Doubles center = Sums<T>::grads_about_zero ? Float64::load(task.mean + c, lanes) : rounding_error_of_mean(c, lanes);
        const Doubles xhat = (product - center * sum) * Float64::load(task.rstd + c, lanes);
        Float64::store(task.sum_grad + c, sum, lanes);
        Float64::store(task.sum_grad_xhat + c, xhat, lanes);
        if (task.verb != Verb::backward) return;
        const bool constant = task.count == 0.0;
        set_input_grad(c, constant ? Doubles{} : sum / task.count, constant ? Doubles{} : xhat / task.count, lanes);
    }

    template <class Lanes>
    void set_input_grad(int64_t c, Doubles mean_grad, Doubles mean_grad_xhat, Lanes lanes) {
        // A single value is its own mean: x̂ is 0 whatever x is, so dx is 0, and the formulas would leave rounding errors.
        const double varies = task.verb == Verb::backward && task.count == 1.0 ? 0.0 : 1.0;
        const Doubles rstd = Float64::load(task.rstd + c, lanes), scale = scale_of(c, lanes) * varies, slope = -scale * mean_grad_xhat;
        set(Numbers::grad_scale, c, scale, lanes);
        set(Numbers::rstd, c, rstd, lanes);
        set(Numbers::slope, c, slope, lanes);
        set(Numbers::level, c, -scale * mean_grad - slope * (rstd * rounding_error_of_mean(c, lanes)), lanes);
    }
};

}  // namespace
