// Running statistics: their update by the statistics of a batch.
#pragma once

#include "torch/call.h"

namespace {

constexpr double several = 1.5;  // as in moments.py

// The statistics of a batch: (C,) each, of `count` values per channel.
struct Batch {
    const double *mean, *m2;
    int64_t C;
    double count;
};

// How a batch updates running statistics: running = (1 - momentum) · running + momentum · batch. With `skip_nonfinite`, neither buffer is
// updated if a statistic of the batch is not finite in its dtype.
struct Update {
    const double momentum;
    const bool unbiased, skip_nonfinite;

    explicit Update(Arguments& arguments) : momentum(arguments.number()), unbiased(arguments.flag()), skip_nonfinite(arguments.flag()) {}
};

#define UPDATE_ARGUMENTS "float momentum, bool unbiased, bool skip_nonfinite"

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

    // Whether they can be written.
    bool fit(int64_t C) const { return are_vectors(mean, variance, C) && is_counter(updates) && is_counter(nonfinite_batches); }
    // Raises if not.
    void check(int64_t C) const {
        for (const Tensor* running : {&mean, &variance}) {
            expect(running->rank == 1 && running->sizes[0] == C, "running statistics must be (C,)");
            expect(running->dtype == mean.dtype, "running statistics must have one dtype");
        }
        expect(is_float32_or_float64(mean), "running statistics must be float32 or float64");
        expect(is_counter(updates) && is_counter(nonfinite_batches), "a counter must be one int64");
    }

    // Updates them by the statistics of one batch if `enabled`, and the counters. Returns whether the statistics were finite.
    bool update_by(const Batch& batch, const Update& update, bool enabled = true) const {
        const bool finite = mean.dtype == dtypes[(int)Dtype::float32] ? update_values<float>(batch, update, enabled)
                                                                      : update_values<double>(batch, update, enabled);
        if (updates && enabled && (finite || !update.skip_nonfinite)) ++*updates.data<int64_t>();
        if (nonfinite_batches && update.skip_nonfinite && !finite) ++*nonfinite_batches.data<int64_t>();
        return finite;
    }

  private:
    static bool is_counter(const Tensor& tensor) { return !tensor || (tensor.values() == 1 && tensor.dtype == int64); }

    template <class Real>
    bool update_values(const Batch& batch, const Update& update, bool enabled) const {
        const double count = update.unbiased ? batch.count - 1.0 : batch.count, divisor = count > 0.0 ? count : 1.0;
        const Scratch variances = scratch(batch.C);
        double* variance_of = variances.get();
        int bad = 0;
#pragma omp simd reduction(| : bad)
        for (int64_t c = 0; c < batch.C; ++c) {
            variance_of[c] = batch.m2[c] / divisor;
            const Real narrow_mean = (Real)batch.mean[c], narrow_variance = (Real)variance_of[c];
            bad |= !(narrow_mean - narrow_mean == 0) | !(narrow_variance - narrow_variance == 0);
        }
        if (!enabled || (update.skip_nonfinite && bad)) return !bad;
        update_one<Real>(mean, batch.mean, batch.C, update.momentum);
        update_one<Real>(variance, variance_of, batch.C, update.momentum);
        return !bad;
    }

    template <class Real>
    static void update_one(const Tensor& running, const double* batch, int64_t C, double momentum) {
        Real* values = running.data<Real>();
        const auto step = [&](Real value, double next) { return (Real)((1.0 - momentum) * (double)value + momentum * next); };
        if (const int64_t stride = running.strides[0]; stride != 1) {
            for (int64_t c = 0; c < C; ++c) values[c * stride] = step(values[c * stride], batch[c]);
            return;
        }
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) values[c] = step(values[c], batch[c]);
    }
};

OPERATOR(update_running, RUNNING_ARGUMENTS ", Tensor mean, Tensor m2, Tensor? masked_count, float count, " UPDATE_ARGUMENTS, "Tensor") {
    const Running running(arguments);
    const Tensor mean = arguments.tensor(), m2 = arguments.tensor(), masked_count = arguments.optional_tensor();
    const double whole_count = arguments.number();
    const Update update(arguments);
    expect(mean.rank == 1, "parameters and statistics must be (C,)");
    const int64_t C = mean.sizes[0];
    const ChannelValues means(mean, C), m2s(m2, C);
    running.check(C);
    const double count = masked_count ? ChannelValues::number(masked_count) : whole_count;
    Tensor finite = Tensor::empty(0, nullptr, nullptr, boolean);
    *finite.data<bool>() = running.update_by({means, m2s, C, count}, update, !masked_count || count > several);
    stack[0] = finite.release();
}

}  // namespace
