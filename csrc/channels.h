// The algebra between the reductions and the maps: what each channel's sums become, in float64, before the loops see it.
//
// With m the mean rounded to Real (float32, or float64 for float64 tensors) and d = x - m, the loops compute
//
//     z  = d · scale + offset              scale = rstd · weight        offset = bias - (mean - m) · scale
//     dx = g · grad_scale + ((d · rstd) · slope + level)
//
//          grad_scale = rstd · weight        slope = -grad_scale · mean(g·x̂)
//          level = -grad_scale · mean(g) - slope · rstd · (mean - m)
//
// The subtraction comes first and what rounding m lost is put back through the offset, so a mean of 1e4 costs no digits; the form
// x · scale + offset, one operation shorter, loses 5e-4 of the deviation there. d · rstd is a product of its own because
// rstd · slope underflows float32 for |x| = 1e25.
//
// Moments are sums about a shift K, a typical value of the channel, the same for all its blocks:
//
//     mean = K + Σ(x-K) / n                M2 = Σ(x-K)² - (Σ(x-K))² / n
//
// If K turns out to lie so far away that the difference cancels more than four bits, the sums are taken once more with K = mean; for
// float64 tensors as soon as the mean, K + a rounded number, would feel it. No division comes before the last step: sums of
// integers stay exact.
//
// Batch renormalization (kernels/correction.py) puts r · weight in the weight's place and d · weight + bias in the bias's, as soon as
// mean and M2 are known: x is read once.
//
// All sums are float64, as torch's are, whose results nothing coarser can match: a float32 sum of eight terms is off by a fifth of the
// last digit of dbias, where torch has all of it right. Nothing overflows or underflows on the way either.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "api.h"
#include "lanes.h"

namespace {

using batchnorm::Task;
using batchnorm::Verb;

INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
INLINE int64_t at_least(int64_t value, int64_t limit) { return value > limit ? value : limit; }
INLINE int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// What a loop knows about its channel, in every lane (planar) or of one channel a lane (interleaved).
template <class Vector>
struct Channel {
    Vector mean, scale, offset, grad_scale, rstd, slope, level;
};

// The numbers of `Channel` side by side, one place for each channel, or for each column of a matrix whose columns belong to channels.
template <class T>
class Table {
  public:
    typedef typename T::Real Real;
    typedef typename T::Vector Vector;
    enum Number { mean, scale, offset, grad_scale, rstd, slope, level, all_numbers };

    // A vector past the end may be loaded, never used.
    explicit Table(int64_t places) : places(places), stride(divide_up(places + T::width, line) * line) {
        values = (Real*)aligned_alloc(cache_line, all_numbers * stride * sizeof(Real));
    }
    // The numbers of places c0 ... c1 - 1 of another, each `copies` times; all of them, or the three that sums and a forward need.
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
        return {all(mean), all(scale), all(offset), all(grad_scale), all(rstd), all(slope), all(level)};
    }
    // Of one place a lane.
    INLINE Channel<Vector> from(int64_t place) const {
        const auto each = [&](int number) { return load_vector<Vector>(values + number * stride + place); };
        return {each(mean), each(scale), each(offset), each(grad_scale), each(rstd), each(slope), each(level)};
    }

    const int64_t places;

  private:
    static constexpr int64_t line = cache_line / sizeof(Real);
    const int64_t stride;
    Real* values;
};

template <class T>
class Channels {
  public:
    typedef typename T::Real Real;

    // `copies` of each channel lie `C` apart, for the interleaved loops, which take several rows as one.
    Channels(const Task& task, int64_t copies) : task(task), copies(copies), table(task.C * copies) {}

    // Before the sums of channel c: `typical` is a value near its mean.
    void begin(int64_t c, double typical) {
        if (task.verb == Verb::moments || task.verb == Verb::forward) {
            set_shift(c, typical);
        } else {
            set_gate(c);
        }
    }

    // What becomes of the sums. False: take them again, about a better K; only if not `last`.
    bool finish(int64_t c, double value, double product, bool last) {
        if (task.verb == Verb::moments || task.verb == Verb::forward) return finish_moments(c, value, product, last);
        finish_grads(c, value, product);
        if (task.verb == Verb::backward) {
            const bool constant = task.count == 0.0;
            set_input_grad(c, constant ? 0.0 : task.sum_grad[c] / task.count,
                           constant ? 0.0 : task.sum_grad_xhat[c] / task.count);
        }
        return true;
    }

    // For a map without sums before it.
    void set_all() {
        for (int64_t c = 0; c < task.C; ++c) {
            if (task.verb == Verb::normalize) {
                set_normalize(c, 0.0);
            } else {
                set_gate(c);
                set_input_grad(c, task.mean_grad ? task.mean_grad[c] : 0.0,
                               task.mean_grad_xhat ? task.mean_grad_xhat[c] : 0.0);
            }
        }
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
    static constexpr double worst_cancellation = sizeof(Real) == sizeof(double) ? 1.0001 : 16.0;

    void set(int number, int64_t c, double value) {
        for (int64_t copy = 0; copy < copies; ++copy) table.at(number, copy * task.C + c) = (Real)value;
    }

    double weight_of(int64_t c) const { return task.weight ? task.weight[c] : 1.0; }
    double scale_of(int64_t c) const { return task.rstd[c] * (task.r ? task.r[c] * weight_of(c) : weight_of(c)); }
    double rest_of_mean(int64_t c) const { return task.mean[c] - (Real)task.mean[c]; }

    // K takes the place of the mean; 0 stands in for what no sum could be taken about.
    void set_shift(int64_t c, double shift) { set(Numbers::mean, c, isfinite(shift) ? shift : 0.0); }

    // `rest` of the mean is what rounding it to float64 lost; only float64 tensors can see it.
    void set_normalize(int64_t c, double rest) {
        const double scale = scale_of(c), given = task.bias ? task.bias[c] : 0.0;
        const double bias = task.d ? task.d[c] * weight_of(c) + given : given;
        set(Numbers::mean, c, task.mean[c]);
        set(Numbers::scale, c, scale);
        set(Numbers::offset, c, bias - (rest_of_mean(c) + rest) * scale);
    }

    // For the derivative of the activation. Where that is read off y, z = y: no scale, no offset, and y is the residual.
    void set_gate(int64_t c) {
        set_normalize(c, 0.0);
        if (task.residual_is_output) set(Numbers::scale, c, 0.0), set(Numbers::offset, c, 0.0);
    }

    bool finish_moments(int64_t c, double sum, double squares, bool last) {
        const double shift = table.at(Numbers::mean, c), count = task.count > 1.0 ? task.count : 1.0;
        const double distance = sum / count, mean = shift + distance;
        double m2 = squares - sum * distance;
        m2 = m2 < 0.0 ? 0.0 : m2;
        if (!last && squares > worst_cancellation * m2) {
            set_shift(c, mean);
            return false;
        }
        task.mean[c] = mean;
        task.m2[c] = m2;
        if (task.verb == Verb::forward) {
            task.rstd[c] = 1.0 / sqrt(m2 / count + task.eps);
            if (task.r) set_correction(c, mean, sqrt(m2 / count + task.eps));
            const double part = mean - shift;
            set_normalize(c, (shift - (mean - part)) + (distance - part));
        }
        return true;
    }

    void set_correction(int64_t c, double mean, double sigma) {
        // NaN stays NaN.
        const auto clip = [](double value, double low, double high) { return value < low ? low : value > high ? high : value; };
        const double running_rstd = 1.0 / sqrt(task.running_var[c] + task.eps);
        task.r[c] = clip(sigma * running_rstd, 1.0 / task.r_max, task.r_max);
        task.d[c] = clip((mean - task.running_mean[c]) * running_rstd, -task.d_max, task.d_max);
    }

    // Products of float32 values are exact in float64, and there is room for the mean: 1e6 deviations of it cost float32 no digit.
    // Float64 has none to spare; there the terms are g · (x - m).
    void finish_grads(int64_t c, double sum, double product) {
        const double center = sizeof(Real) < sizeof(double) ? task.mean[c] : rest_of_mean(c);
        task.sum_grad[c] = sum;
        task.sum_grad_xhat[c] = (product - center * sum) * task.rstd[c];
    }

    void set_input_grad(int64_t c, double mean_grad, double mean_grad_xhat) {
        const double scale = scale_of(c), slope = -scale * mean_grad_xhat;
        set(Numbers::grad_scale, c, scale);
        set(Numbers::rstd, c, task.rstd[c]);
        set(Numbers::slope, c, slope);
        set(Numbers::level, c, -scale * mean_grad - slope * (task.rstd[c] * rest_of_mean(c)));
    }
};

}  // namespace
