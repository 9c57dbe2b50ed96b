// The fast path: a layer's call as one operator. In training it is `forward` and `update_running`, in inference `infer`; the backward of
// both gives the gradients in the parameters' dtype. The time of a tiny tensor is the time of the calls around its kernels: here they are
// two instead of four, and the autograd engine converts nothing.
#pragma once

#include <math.h>

#include <optional>

#include "torch/running.h"

namespace {

// Whether the fast path takes these arguments. The general path takes all others, and raises the errors.
inline bool takes_fast_path(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual) {
    if (x.rank < 2 || x.values() == 0 || !is_floating(x.dtype)) return false;
    if (residual && !(residual.has_sizes_of(x) && residual.dtype == x.dtype)) return false;
    const Layout layout(x);
    if (!layout.planar && !layout.interleaved) return false;
    if (!weight) return !bias;
    const int32_t wide = dtypes[(int)Dtype::float64];
    return are_vectors(weight, bias ? bias : weight, x.sizes[1]) && (weight.dtype != wide || x.dtype == wide);
}
inline bool trains_on_fast_path(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& residual, double eps) {
    return takes_fast_path(x, weight, bias, residual) && x.values() > x.sizes[1] && eps > 0.0;
}

// One call of a layer. It returns y and the statistics for the backward: mean and rstd, (2, C), or mean, rstd, r and d, (4, C), of batch
// renormalization.
struct LayerCall {
    const int64_t C;
    const ChannelOperand weights, biases;
    Call call;
    Tensor y, statistics;

    LayerCall(Verb verb, const Tensor& x, const Tensor& weight, const Tensor& bias, Tensor& residual, double eps, Arguments& arguments,
              bool renormalized = false)
        : C(x.sizes[1]), weights(weight, C), biases(bias, C), call(verb, x), y(call.output()) {
        const int64_t sizes[] = {renormalized ? 4 : 2, C}, strides[] = {C, 1};
        statistics = Tensor::empty(2, sizes, strides, dtypes[(int)Dtype::float64]);
        Task& task = call.task;
        task.eps = eps;
        task.weight = weights, task.bias = biases;
        task.residual = call.in_layout_of_x(residual);
        call.set_activation(arguments);
        task.output = y.data<void>();
        task.mean = statistics.data<double>(), task.rstd = task.mean + C;
        if (renormalized) task.r = task.rstd + C, task.d = task.r + C;
    }
    void return_on(StableIValue* stack) { stack[0] = y.release(), stack[1] = statistics.release(); }
};

// Returns two empty tensors for a call that the fast path does not take; nothing was written.
inline void decline(StableIValue* stack, const Tensor& x) { stack[0] = nothing(x).release(), stack[1] = nothing(x).release(); }

// The bounds of r and d in batch renormalization, which widen with the number of batches, see `Renorm.bounds`.
struct Bounds {
    const double r_max, d_max, warmup;

    explicit Bounds(Arguments& arguments) : r_max(arguments.number()), d_max(arguments.number()), warmup(arguments.number()) {}

    void set(Task& task, int64_t batches) const {
        task.r_max = r_max, task.d_max = d_max;
        if (warmup == 0.0) return;
        const double after = (double)batches - warmup;
        task.r_max = fmin(fmax(1.0 + after * ((r_max - 1.0) / (7.0 * warmup)), 1.0), r_max);
        task.d_max = fmin(fmax(after * (d_max / (4.0 * warmup)), 0.0), d_max);
    }
};

template <bool renormalized>
void run_training_step(Arguments& arguments, StableIValue* stack) {
    const Tensor x = arguments.tensor(), weight = arguments.optional_tensor(), bias = arguments.optional_tensor();
    Tensor residual = arguments.optional_tensor();
    const Running running(arguments);
    const Update update(arguments);
    std::optional<Bounds> bounds;
    if (renormalized) bounds.emplace(arguments);
    const double eps = arguments.number();
    if (!trains_on_fast_path(x, weight, bias, residual, eps) || !running.fit(x.sizes[1]) || (renormalized && !running.updates))
        return decline(stack, x);
    LayerCall layer(Verb::forward, x, weight, bias, residual, eps, arguments, renormalized);
    const Scratch m2 = scratch(layer.C);
    Task& task = layer.call.task;
    const Tensor none;
    const ChannelOperand means(renormalized ? running.mean : none, layer.C);
    const ChannelOperand variances(renormalized ? running.variance : none, layer.C);
    if (renormalized) {
        task.running_mean = means, task.running_var = variances;
        bounds->set(task, *running.updates.data<int64_t>());
    }
    task.count = count_of(x, {});
    task.m2 = m2.get();
    layer.call.run();
    running.update_by({task.mean, task.m2, layer.C, task.count}, update);
    layer.return_on(stack);
}

#define STEP_ARGUMENTS "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, " RUNNING_ARGUMENTS ", " UPDATE_ARGUMENTS ", "

OPERATOR(training_step, STEP_ARGUMENTS "float eps, " ACTIVATION_ARGUMENTS, "(Tensor, Tensor)") {
    run_training_step<false>(arguments, stack);
}

OPERATOR(renormalization_step, STEP_ARGUMENTS "float r_max, float d_max, float warmup, float eps, " ACTIVATION_ARGUMENTS,
         "(Tensor, Tensor)") {
    run_training_step<true>(arguments, stack);
}

OPERATOR(
    inference_step,
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor running_mean, Tensor running_var, float eps, " ACTIVATION_ARGUMENTS,
    "(Tensor, Tensor)") {
    const Tensor x = arguments.tensor(), weight = arguments.optional_tensor(), bias = arguments.optional_tensor();
    Tensor residual = arguments.optional_tensor();
    const Tensor running_mean = arguments.tensor(), running_var = arguments.tensor();
    const double eps = arguments.number();
    if (!takes_fast_path(x, weight, bias, residual) || !are_vectors(running_mean, running_var, x.sizes[1]) || !(eps >= 0.0))
        return decline(stack, x);
    LayerCall layer(Verb::normalize, x, weight, bias, residual, eps, arguments);
    const Constants constants(layer.call.task, running_mean, running_var, eps, layer.C);
    layer.call.run();
    layer.return_on(stack);
}

// Float64 values in another dtype, float32 or float64.
inline Tensor rounded(const double* values, int64_t C, int32_t dtype) {
    Tensor tensor = Tensor::vector(C, dtype);
    const auto round = [&](auto* narrow) {
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) narrow[c] = values[c];
    };
    dtype == dtypes[(int)Dtype::float32] ? round(tensor.data<float>()) : round(tensor.data<double>());
    return tensor;
}

// The backward of both operators: dx, dweight, dbias and dresidual. Without an activation dresidual is dy, and is not asked for.
template <bool constant_statistics>
void run_step_backward(Arguments& arguments, StableIValue* stack) {
    Tensor dy = arguments.tensor();
    const Tensor x = arguments.tensor(), statistics = arguments.tensor();
    const Tensor weight = arguments.optional_tensor(), bias = arguments.optional_tensor();
    Tensor residual = arguments.optional_tensor();
    Call call(Verb::backward, x);
    const int64_t C = x.sizes[1], rows = statistics.rank == 2 ? statistics.sizes[0] : 0;
    const ChannelOperand weights(weight, C), biases(bias, C);
    expect(statistics.dtype == dtypes[(int)Dtype::float64] && statistics.is_contiguous() && (rows == 2 || rows == 4) &&
               statistics.sizes[1] == C,
           "the statistics of a step must be (2, C) or (4, C) in float64");
    expect(!weight || is_float32_or_float64(weight), "the parameters of a step must be float32 or float64");
    Task& task = call.task;
    call.set_activation(arguments);
    task.residual_is_output = arguments.flag();
    const bool wants_dresidual = arguments.flag(), wants_dx = arguments.flag();
    Tensor dx = wants_dx ? call.output() : nothing(x);
    Tensor dresidual = wants_dresidual ? call.output() : nothing(x);
    const Scratch sum_grad = scratch(C), sum_grad_xhat = scratch(C);
    task.dy = call.in_layout_of_x(dy);
    task.residual = call.in_layout_of_x(residual);
    task.mean = statistics.data<double>(), task.rstd = task.mean + C;
    task.count = constant_statistics ? 0.0 : count_of(x, {});
    task.weight = weights, task.bias = biases;
    // Batch renormalization: x̂ · r + d replaces x̂, see kernels/correction.py.
    const double* const r = rows == 4 ? task.rstd + C : nullptr;
    const double* const d = r ? r + C : nullptr;
    const Tensor none;
    const ChannelValues gammas(r ? weight : none, C), betas(r ? bias : none, C);
    const Scratch corrected_weight = scratch(r ? C : 0), corrected_bias = scratch(r ? C : 0);
    for (int64_t c = 0; r && c < C; ++c) {
        const double gamma = weight ? gammas[c] : 1.0;
        corrected_weight[c] = r[c] * gamma;
        corrected_bias[c] = d[c] * gamma + (bias ? betas[c] : 0.0);
    }
    if (r) task.weight = corrected_weight.get(), task.bias = corrected_bias.get();
    task.sum_grad = sum_grad.get(), task.sum_grad_xhat = sum_grad_xhat.get();
    task.output = wants_dx ? dx.data<void>() : nullptr;
    task.dresidual = wants_dresidual ? dresidual.data<void>() : nullptr;
    if (!wants_dx && !wants_dresidual) task.verb = Verb::reduce_grad;
    call.run();
    for (int64_t c = 0; r && c < C; ++c) sum_grad_xhat[c] = r[c] * sum_grad_xhat[c] + d[c] * sum_grad[c];
    stack[0] = dx.release();
    stack[1] = (weight ? rounded(sum_grad_xhat.get(), C, weight.dtype) : nothing(x)).release();
    stack[2] = (weight ? rounded(sum_grad.get(), C, weight.dtype) : nothing(x)).release();
    stack[3] = dresidual.release();
}

#define STEP_BACKWARD_ARGUMENTS                                                                                     \
    "Tensor dy, Tensor x, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? residual, " ACTIVATION_ARGUMENTS \
    ", bool residual_is_output, bool wants_dresidual, bool wants_dx"

OPERATOR(training_step_backward, STEP_BACKWARD_ARGUMENTS, "(Tensor, Tensor, Tensor, Tensor)") {
    run_step_backward<false>(arguments, stack);
}
OPERATOR(inference_step_backward, STEP_BACKWARD_ARGUMENTS, "(Tensor, Tensor, Tensor, Tensor)") {
    run_step_backward<true>(arguments, stack);
}

}  // namespace
