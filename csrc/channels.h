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
// All sums are float64. torch's are, and a float32 sum in blocks, four times cheaper in arithmetic, was off by up to four times as
// much as torch's in dbias; loops that wait for memory do not gain by it. Nothing overflows or underflows on the way either.
#pragma once

#include <math.h>
#include <stdlib.h>

#include "api.h"
#include "lanes.h"

namespace {

using batchnorm::Task;
using batchnorm::Verb;



// What a loop knows about its channel, in every lane (planar) or of one channel a lane (interleaved).
template <class Vector>
struct Channel {
    Vector mean, scale, offset, grad_scale, rstd, slope, level;
};

template <class T>
class Channels {
  public:
    typedef typename T::Real Real;
    typedef typename T::Vector Vector;

    // `copies` of each channel lie `C` apart, for the interleaved loops, which take several rows as one.
    Channels(const Task& task, int64_t copies) : task(task), copies(copies), length(task.C * copies) {
        // A vector past the end may be loaded, never used.
        table = (Real*)calloc(rows * length + T::width, sizeof(Real));
    }
    ~Channels() { free(table); }
    Channels(const Channels&) = delete;
    Channels& operator=(const Channels&) = delete;

    INLINE Channel<Vector> of(int64_t c) const {
        return {all(0, c), all(1, c), all(2, c), all(3, c), all(4, c), all(5, c), all(6, c)};
    }
    INLINE Channel<Vector> from(int64_t column) const {
        return {each(0, column), each(1, column), each(2, column), each(3, column),
                each(4, column), each(5, column), each(6, column)};
    }

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
    const int64_t copies, length;

  private:
    static constexpr int rows = 7;
    static constexpr double worst_cancellation = sizeof(Real) == sizeof(double) ? 1.0001 : 16.0;
    Real* table;

    INLINE Vector all(int row, int64_t c) const { return Vector{} + table[row * length + c]; }
    INLINE Vector each(int row, int64_t column) const { return load_vector<Vector>(table + row * length + column); }

    void set(int row, int64_t c, double value) {
        for (int64_t copy = 0; copy < copies; ++copy) table[row * length + copy * task.C + c] = (Real)value;
    }
    double scale_of(int64_t c) const { return task.weight ? task.rstd[c] * task.weight[c] : task.rstd[c]; }
    double rest_of_mean(int64_t c) const { return task.mean[c] - (Real)task.mean[c]; }

    // K takes the place of the mean; 0 stands in for what no sum could be taken about.
    void set_shift(int64_t c, double shift) { set(0, c, isfinite(shift) ? shift : 0.0); }

    // `rest` of the mean is what rounding it to float64 lost; only float64 tensors can see it.
    void set_normalize(int64_t c, double rest) {
        const double scale = scale_of(c), bias = task.bias ? task.bias[c] : 0.0;
        set(0, c, task.mean[c]);
        set(1, c, scale);
        set(2, c, bias - (rest_of_mean(c) + rest) * scale);
    }

    // For the derivative of the activation. Where that is read off y, z = y: no scale, no offset, and y is the residual.
    void set_gate(int64_t c) {
        set_normalize(c, 0.0);
        if (task.residual_is_output) set(1, c, 0.0), set(2, c, 0.0);
    }

    bool finish_moments(int64_t c, double sum, double squares, bool last) {
        const double shift = table[c], count = task.count > 1.0 ? task.count : 1.0;
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
            const double part = mean - shift;
            set_normalize(c, (shift - (mean - part)) + (distance - part));
        }
        return true;
    }

    void finish_grads(int64_t c, double sum, double product) {
        task.sum_grad[c] = sum;
        task.sum_grad_xhat[c] = (product - rest_of_mean(c) * sum) * task.rstd[c];
    }

    void set_input_grad(int64_t c, double mean_grad, double mean_grad_xhat) {
        const double scale = scale_of(c), slope = -scale * mean_grad_xhat;
        set(3, c, scale);
        set(4, c, task.rstd[c]);
        set(5, c, slope);
        set(6, c, -scale * mean_grad - slope * (task.rstd[c] * rest_of_mean(c)));
    }
};

}  // namespace
