// The algebra between the reductions and the maps: what each channel's sums become, in float64, before the loops see it.
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
// The subtraction comes first and what rounding m lost is put back through the offset, so a mean of 1e4 costs no digits; the form
// x · scale + offset, one operation shorter, loses 5e-4 of the deviation there. What rounding the scale to float32 loses, scale_rest
// puts back: without it y would be off by up to 1.5 units in the last place, with it by 1. d · rstd is a product of its own because
// rstd · slope underflows float32 for |x| = 1e25.
//
// Moments are sums about a shift K, which is 0 or a typical value of the channel (sums.h), the same for all its blocks:
//
//     mean = K + Σ(x-K) / n                M2 = Σ(x-K)² - (Σ(x-K))² / n
//
// If K turns out to lie so far away that the difference cancels more digits than there are to spare, the sums are taken once more with
// K = mean. No division comes before the last step: sums of integers stay exact. Those of float32 and float64 are float64, as torch's
// are, whose results nothing coarser can match: a float32 sum of eight terms is off by a fifth of the last digit of dbias, where torch
// has all of it right. Nothing of theirs overflows or underflows on the way either.
//
// Batch renormalization (kernels/correction.py) puts r · weight in the weight's place and d · weight + bias in the bias's, as soon as
// mean and M2 are known: x is read once.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "api.h"
#include "kernels/sums.h"

namespace {

using batchnorm::Task;
using batchnorm::Verb;

INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
INLINE int64_t at_least(int64_t value, int64_t limit) { return value > limit ? value : limit; }
INLINE int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// The mask of what is summed; null where nothing is, and what counts need not be listed: of a mask of 1.3 million scattered positions that
// takes 20 ms, and the map of one channel 0.6.
INLINE const uint8_t* mask_of_sums(const Task& task) {
    return task.verb == Verb::normalize || task.verb == Verb::input_grad ? nullptr : task.mask;
}

// What a loop knows about its channel, in every lane (planar) or of one channel a lane (interleaved).
template <class Vector>
struct Channel {
    Vector mean, scale, scale_rest, offset, grad_scale, rstd, slope, level;
};

// The numbers of one in some lanes, of the other in the rest.
template <class Vector>
INLINE Channel<Vector> joined(const Channel<Vector>& one, const Channel<Vector>& other, Partial lanes) {
    const auto both = [&](Vector Channel<Vector>::*number) { return within(one.*number, other.*number, lanes); };
    typedef Channel<Vector> Numbers;
    return {both(&Numbers::mean), both(&Numbers::scale), both(&Numbers::scale_rest), both(&Numbers::offset),
            both(&Numbers::grad_scale), both(&Numbers::rstd), both(&Numbers::slope), both(&Numbers::level)};
}

// The numbers of `Channel` side by side, one place for each channel, or for each column of a matrix whose columns belong to channels.
template <class T>
class Table {
  public:
    typedef typename T::Real Real;
    typedef typename T::Vector Vector;
    enum Number { mean, scale, scale_rest, offset, grad_scale, rstd, slope, level, all_numbers };

    // A vector past the end may be loaded, never used.
    explicit Table(int64_t places) : places(places), stride(divide_up(places + T::width, line) * line) {
        values = (Real*)aligned_alloc(cache_line, all_numbers * stride * sizeof(Real));
    }
    // The numbers of places c0 ... c1 - 1 of another, each `copies` times; all of them, or the four that sums and a forward need.
    Table(const Table& other, int64_t c0, int64_t c1, int64_t copies, bool all) : Table((c1 - c0) * copies) {
        for (int number = 0; number < (all ? all_numbers : grad_scale); ++number)
            for (int64_t c = c0; c < c1; ++c) {
                const Vector value = Vector{} + other.at(number, c);
                // The last vector reaches into the next channel, which comes later, or past the end.
                for (int64_t copy = 0; copy < copies; copy += T::width)
                    memcpy(&at(number, (c - c0) * copies + copy), &value, sizeof value);
            }
    }
    ~Table() { free(values); }
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;

    Real& at(int number, int64_t place) { return values[number * stride + place]; }
    Real at(int number, int64_t place) const { return values[number * stride + place]; }

    // Of one place, in every lane.
    INLINE Channel<Vector> of(int64_t place) const {
        const auto all = [&](int number) { return Vector{} + at(number, place); };
        return {all(mean), all(scale), all(scale_rest), all(offset), all(grad_scale), all(rstd), all(slope), all(level)};
    }
    // Of one place a lane.
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

// The channels of one call, eight at a time: with few values in each, theirs is most of the arithmetic.
template <class T>
class Channels {
  public:
    typedef typename T::Real Real;

    // `copies` of each channel lie `C` apart, for the interleaved loops, which take several rows as one.
    Channels(const Task& task, int64_t copies) : task(task), copies(copies), table(task.C * copies) {
        open = (bool*)malloc(task.C);
    }
    ~Channels() { free(open); }
    Channels(const Channels&) = delete;
    Channels& operator=(const Channels&) = delete;

    // Before the sums of channels c0 ... c1 - 1: typical(c) is a value near the mean of c.
    template <class Typical>
    void begin(int64_t c0, int64_t c1, const Typical& typical) {
        if (!takes_moments()) return for_lanes(c0, c1, [&](int64_t c, auto part) { set_gate(c, part); });
        if (Sums<T>::about_zero) return;
        for (int64_t c = c0; c < c1; ++c) set_shift(c, Doubles{} + typical(c), Partial{1});
    }

    // What becomes of the sums. Whether some channels, now `is_open`, are to be summed again, about a better K; none if these were
    // `again`.
    bool finish(int64_t c0, int64_t c1, const double* values, const double* products, bool again) {
        bool more = false;
        for_lanes(c0, c1, [&](int64_t c, auto part) {
            const Doubles value = Float64::load(values + (c - c0), part), product = Float64::load(products + (c - c0), part);
            if (takes_moments()) {
                more |= finish_moments(c, value, product, again, part);
            } else {
                finish_grads(c, value, product, part);
            }
        });
        return more;
    }
    bool is_open(int64_t c) const { return open[c]; }

    // For a map without sums before it.
    void set_all() {
        for_lanes(0, task.C, [&](int64_t c, auto part) {
            if (task.verb == Verb::normalize) return set_normalize(c, Doubles{}, part);
            set_gate(c, part);
            const auto given = [&](const double* values) { return values ? Float64::load(values + c, part) : Doubles{}; };
            set_input_grad(c, given(task.mean_grad), given(task.mean_grad_xhat), part);
        });
    }

    // The middle of four values: a typical one, even where most of a channel is 0; exact where all four are the same.
    static double middle(double a, double b, double c, double d) {
        const double low = fmax(fmin(a, b), fmin(c, d)), high = fmin(fmax(a, b), fmax(c, d));
        return 0.5 * low + 0.5 * high;
    }

    const Task& task;
    const int64_t copies;
    Table<T> table;

  private:
    typedef Table<T> Numbers;
    typedef typename InFloat64<Real>::Storage Stored;
    bool* open;

    bool takes_moments() const { return task.verb == Verb::moments || task.verb == Verb::forward; }

    // body(c, Whole) for eight channels, body(c, Partial) for what is left.
    template <class Body>
    static INLINE void for_lanes(int64_t c, int64_t c1, const Body& body) {
        for (; c + Float64::width <= c1; c += Float64::width) body(c, Whole{});
        if (c < c1) body(c, Partial{(int)(c1 - c)});
    }

    template <class Part>
    void set(int number, int64_t c, Doubles values, Part part) {
        for (int64_t copy = 0; copy < copies; ++copy) Stored::store(&table.at(number, copy * task.C + c), values, part);
    }
    template <class Part>
    Doubles scale_of(int64_t c, Part part) const {
        const Doubles weight = weight_of(c, part), rstd = Float64::load(task.rstd + c, part);
        return rstd * (task.r ? Float64::load(task.r + c, part) * weight : weight);
    }
    template <class Part>
    Doubles weight_of(int64_t c, Part part) const {
        return task.weight ? Float64::load(task.weight + c, part) : Doubles{} + 1.0;
    }
    // What rounding to Real loses; nothing of what is too large for Real.
    static Doubles rest_of(Doubles values) {
        const Doubles rest = values - Stored::rounded(values);
        return rest - rest == 0.0 ? rest : Doubles{};
    }
    template <class Part>
    Doubles rest_of_mean(int64_t c, Part part) const {
        const Doubles mean = Float64::load(task.mean + c, part);
        return mean - Stored::rounded(mean);
    }

    // K takes the place of the mean; 0 stands in for what no sum could be taken about.
    template <class Part>
    void set_shift(int64_t c, Doubles shift, Part part) {
        set(Numbers::mean, c, shift - shift == 0.0 ? shift : Doubles{}, part);
    }

    // `rest` of the mean is what rounding it to float64 lost; only float64 tensors can see it.
    template <class Part>
    void set_normalize(int64_t c, Doubles rest, Part part) {
        const Doubles scale = scale_of(c, part), given = task.bias ? Float64::load(task.bias + c, part) : Doubles{};
        const Doubles bias = task.d ? Float64::load(task.d + c, part) * weight_of(c, part) + given : given;
        set(Numbers::mean, c, Float64::load(task.mean + c, part), part);
        set(Numbers::scale, c, scale, part);
        set(Numbers::scale_rest, c, rest_of(scale), part);
        set(Numbers::offset, c, bias - (rest_of_mean(c, part) + rest) * scale, part);
    }

    // For the derivative of the activation. Where that is read off y, z = y: no scale, no offset, and y is the residual.
    template <class Part>
    void set_gate(int64_t c, Part part) {
        set_normalize(c, Doubles{}, part);
        if (!task.residual_is_output) return;
        set(Numbers::scale, c, Doubles{}, part), set(Numbers::scale_rest, c, Doubles{}, part);
        set(Numbers::offset, c, Doubles{}, part);
    }

    template <class Part>
    bool finish_moments(int64_t c, Doubles sum, Doubles squares, bool again, Part part) {
        const Doubles shift = Sums<T>::about_zero && !again ? Doubles{} : Stored::load(&table.at(Numbers::mean, c), part);
        const double count = task.count > 1.0 ? task.count : 1.0;
        const Doubles distance = sum / count, mean = shift + distance;
        Doubles m2 = squares - sum * distance;
        m2 = m2 < 0.0 ? Doubles{} : m2;
        Longs cancels = squares > Sums<T>::worst_cancellation * m2;
        if (Sums<T>::may_overflow) cancels |= squares - squares != 0.0;
        Float64::store(task.mean + c, mean, part);
        Float64::store(task.m2 + c, m2, part);
        if (task.verb == Verb::forward) {
            const Doubles sigma = Simd::square_root(m2 / count + task.eps);
            Float64::store(task.rstd + c, 1.0 / sigma, part);
            if (task.r) set_correction(c, mean, sigma, part);
            const Doubles taken = mean - shift;
            set_normalize(c, (shift - (mean - taken)) + (distance - taken), part);
        }
        if (again) return false;
        bool more = false;
        for (int lane = 0; lane < part.end_of(Float64::width); ++lane) more |= open[c + lane] = cancels[lane] != 0;
        if (!more) return false;
        for (int lane = 0; lane < part.end_of(Float64::width); ++lane)
            if (open[c + lane]) set_shift(c + lane, Doubles{} + mean[lane], Partial{1});
        return true;
    }

    template <class Part>
    void set_correction(int64_t c, Doubles mean, Doubles sigma, Part part) {
        const auto clip = [](Doubles value, double low, double high) {  // NaN stays NaN
            const Doubles raised = value < low ? Doubles{} + low : value;
            return raised > high ? Doubles{} + high : raised;
        };
        const Doubles running_rstd = 1.0 / Simd::square_root(Float64::load(task.running_var + c, part) + task.eps);
        const Doubles distance = mean - Float64::load(task.running_mean + c, part);
        Float64::store(task.r + c, clip(sigma * running_rstd, 1.0 / task.r_max, task.r_max), part);
        Float64::store(task.d + c, clip(distance * running_rstd, -task.d_max, task.d_max), part);
    }

    // About zero there is room for the mean: 1e6 deviations of it cost float32 no digit. Otherwise the terms are g · (x - m).
    template <class Part>
    void finish_grads(int64_t c, Doubles sum, Doubles product, Part part) {
        const Doubles center = Sums<T>::grads_about_zero ? Float64::load(task.mean + c, part) : rest_of_mean(c, part);
        const Doubles xhat = (product - center * sum) * Float64::load(task.rstd + c, part);
        Float64::store(task.sum_grad + c, sum, part);
        Float64::store(task.sum_grad_xhat + c, xhat, part);
        if (task.verb != Verb::backward) return;
        const bool constant = task.count == 0.0;
        set_input_grad(c, constant ? Doubles{} : sum / task.count, constant ? Doubles{} : xhat / task.count, part);
    }

    template <class Part>
    void set_input_grad(int64_t c, Doubles mean_grad, Doubles mean_grad_xhat, Part part) {
        // One value is its own mean: x̂ is 0 whatever x is, and of the differences below only their rounding would be left.
        const double moves = task.verb == Verb::backward && task.count == 1.0 ? 0.0 : 1.0;
        const Doubles rstd = Float64::load(task.rstd + c, part), scale = scale_of(c, part) * moves, slope = -scale * mean_grad_xhat;
        set(Numbers::grad_scale, c, scale, part);
        set(Numbers::rstd, c, rstd, part);
        set(Numbers::slope, c, slope, part);
        set(Numbers::level, c, -scale * mean_grad - slope * (rstd * rest_of_mean(c, part)), part);
    }
};

}  // namespace
