// Running statistics: their update by the statistics of a batch.
#pragma once

#include "torch/call.h"

namespace {

// running = (1 - momentum) · running + momentum · batch, for both buffers. With `skip_nonfinite`, neither is updated if a statistic of the
// batch is not finite as Real. Returns whether all are finite.
template <class Real>
bool update(const Tensor& running_mean, const Tensor& running_var, const double* mean, const double* m2, int64_t C,
            double divisor, double momentum, bool enabled, bool skip_nonfinite) {
    const Scratch variances = scratch(C);
    double* variance = variances.get();
    int bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t c = 0; c < C; ++c) {
        variance[c] = m2[c] / divisor;
        const Real narrow_mean = (Real)mean[c], narrow_variance = (Real)variance[c];
        bad |= !(narrow_mean - narrow_mean == 0) | !(narrow_variance - narrow_variance == 0);
    }
    if (!enabled || (skip_nonfinite && bad)) return !bad;
    const auto update_one = [&](const Tensor& running, const double* batch) {
        Real* values = running.data<Real>();
        const auto step = [&](Real value, double next) { return (Real)((1.0 - momentum) * (double)value + momentum * next); };
        if (const int64_t stride = running.strides[0]; stride != 1) {
            for (int64_t c = 0; c < C; ++c) values[c * stride] = step(values[c * stride], batch[c]);
            return;
        }
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) values[c] = step(values[c], batch[c]);
    };
    update_one(running_mean, mean), update_one(running_var, variance);
    return !bad;
}

#define RUNNING_ARGUMENTS                               \
    "Tensor(a!) running_mean, Tensor(b!) running_var, " \
    "Tensor(c!)? updates, Tensor(d!)? nonfinite_batches"

// A layer's running statistics and counters.
struct Running {
    Tensor mean, variance;
    Tensor updates, nonfinite_batches;  // how many batches updated them, and how many were not finite

    explicit Running(Arguments& arguments)
        : mean(arguments.tensor()),
          variance(arguments.tensor()),
          updates(arguments.optional_tensor()),
          nonfinite_batches(arguments.optional_tensor()) {}

    // Checks them before they are written.
    void check(int64_t C) const {
        for (const Tensor* running : {&mean, &variance}) {
            expect(running->rank == 1 && running->sizes[0] == C, "running statistics must be (C,)");
            expect(running->dtype == mean.dtype, "running statistics must have one dtype");
        }
        const int32_t dtype = mean.dtype;
        const bool has_kernel = dtype == dtypes[(int)Dtype::float32] || dtype == dtypes[(int)Dtype::float64];
        expect(has_kernel, "running statistics must be float32 or float64");
        for (const Tensor* counter : {&updates, &nonfinite_batches})
            expect(!*counter || (counter->dtype == int64 && counter->values() == 1), "a counter must be one int64");
    }

    // Updates them by the statistics of one batch, and the counters. Returns whether the statistics were finite.
    bool update_by(const double* batch_mean, const double* m2, int64_t C, double count, bool enabled, double momentum,
                   bool unbiased, bool skip_nonfinite) {
        const double divisor = unbiased ? count - 1.0 : count;
        const auto step = mean.dtype == dtypes[(int)Dtype::float32] ? update<float> : update<double>;
        const bool finite = step(mean, variance, batch_mean, m2, C, divisor > 1.0 ? divisor : 1.0, momentum, enabled, skip_nonfinite);
        if (updates && enabled && (finite || !skip_nonfinite)) ++*updates.data<int64_t>();
        if (nonfinite_batches && skip_nonfinite && !finite) ++*nonfinite_batches.data<int64_t>();
        return finite;
    }
};

OPERATOR(update_running,
         RUNNING_ARGUMENTS
         ", Tensor mean, Tensor m2, Tensor? masked_count, float count, float momentum, bool unbiased, bool skip_nonfinite",
         "Tensor") {
    Arguments arguments(stack);
    Running running(arguments);
    const Tensor mean = arguments.tensor(), m2 = arguments.tensor(), masked_count = arguments.optional_tensor();
    const double whole_count = arguments.number(), momentum = arguments.number();
    const bool unbiased = arguments.flag(), skip_nonfinite = arguments.flag();
    expect(mean.rank == 1, "parameters and statistics must be (C,)");
    const int64_t C = mean.sizes[0];
    const ChannelValues means(mean, C), m2s(m2, C);
    running.check(C);
    const double count = masked_count ? ChannelValues::number(masked_count) : whole_count;
    Tensor finite = Tensor::empty(0, nullptr, nullptr, boolean);
    *finite.data<bool>() =
        running.update_by(means, m2s, C, count, !masked_count || count > 1.0, momentum, unbiased, skip_nonfinite);
    stack[0] = finite.release();
}

}  // namespace
