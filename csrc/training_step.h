// A layer's training in two operators: `forward` and `update_running` in one, and `backward` with the gradients in the parameters' dtype.
// A tiny tensor costs what the calls around its kernels cost: two where there were four, and no conversion by the autograd engine.
// A part of torch_shim.cpp, whose classes it uses.
#pragma once

namespace {

bool is_float32_or_float64(const Tensor& tensor) {
    return tensor.dtype == dtypes[(int)Dtype::float32] || tensor.dtype == dtypes[(int)Dtype::float64];
}

// The usual case, whose arguments nothing is wrong with: the rest goes the long way, which has words for it.
bool takes_training_step(const Tensor& x, const Tensor& weight, const Tensor& bias, const Running& running, double eps) {
    if (x.rank < 2 || !(eps > 0.0)) return false;
    const int64_t C = x.sizes[1], values = x.values();
    if (values <= C) return false;  // none, or one for each channel
    bool known = false;
    for (const int32_t dtype : dtypes) known |= x.dtype == dtype;
    if (!known) return false;
    const Layout layout(x);
    if (!layout.planar && !layout.interleaved) return false;
    const auto is_vector = [&](const Tensor& tensor, const Tensor& of_dtype) {
        return tensor.rank == 1 && tensor.sizes[0] == C && tensor.dtype == of_dtype.dtype && is_float32_or_float64(tensor);
    };
    for (const Tensor* counter : {&running.moved_batches, &running.nonfinite_batches})
        if (*counter && (counter->rank != 0 || counter->dtype != int64)) return false;
    if (!is_vector(running.mean, running.mean) || !is_vector(running.variance, running.mean)) return false;
    if (bias && !(weight && is_vector(bias, weight))) return false;
    if (!weight) return true;
    const int32_t wide = dtypes[(int)Dtype::float64];
    return is_vector(weight, weight) && (weight.dtype != wide || x.dtype == wide);
}

// y, and mean and rstd of the batch, (2, C); where it does not take the call both are empty and nothing was touched.
void training_step(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Tensor x = arguments.tensor(), weight = arguments.optional_tensor(), bias = arguments.optional_tensor();
    Running running(arguments);
    const double momentum = arguments.number();
    const bool unbiased = arguments.flag(), skip_nonfinite = arguments.flag();
    const double eps = arguments.number();
    const Activation activation = (Activation)arguments.integer();
    const double slope = arguments.number();
    if (!takes_training_step(x, weight, bias, running, eps)) {
        stack[0] = nothing(x).release(), stack[1] = nothing(x).release();
        return;
    }
    const int64_t C = x.sizes[1], sizes[] = {2, C}, strides[] = {C, 1};
    const ChannelValues weights(weight, C), biases(bias, C);
    Call call(Verb::forward, x);
    Task& task = call.task;
    Tensor y = call.output(), statistics = Tensor::empty(2, sizes, strides, dtypes[(int)Dtype::float64]);
    std::vector<double> m2(C);
    task.eps = eps, task.count = count_of(x, {});
    task.weight = weights, task.bias = biases;
    task.activation = activation, task.slope = slope;
    task.output = y.data<void>();
    task.mean = statistics.data<double>(), task.rstd = task.mean + C, task.m2 = m2.data();
    call.run();
    running.follow(task.mean, task.m2, C, task.count, true, momentum, unbiased, skip_nonfinite);
    stack[0] = y.release(), stack[1] = statistics.release();
}

// Float64 values in the dtype of `like`, float32 or float64.
Tensor rounded(const std::vector<double>& values, const Tensor& like) {
    Tensor tensor = Tensor::vector((int64_t)values.size(), like.dtype);
    const auto round = [&](auto* narrow) {
        for (size_t c = 0; c < values.size(); ++c) narrow[c] = values[c];
    };
    like.dtype == dtypes[(int)Dtype::float32] ? round(tensor.data<float>()) : round(tensor.data<double>());
    return tensor;
}

// dx, dweight, dbias of what `training_step` took.
void training_step_backward(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Tensor dy = arguments.tensor();
    const Tensor x = arguments.tensor(), statistics = arguments.tensor();
    const Tensor weight = arguments.optional_tensor(), bias = arguments.optional_tensor();
    const int64_t C = x.sizes[1];
    const ChannelValues weights(weight, C), biases(bias, C);
    Call call(Verb::backward, x);
    Task& task = call.task;
    task.activation = (Activation)arguments.integer();
    task.slope = arguments.number();
    const bool wants_dx = arguments.flag();
    Tensor dx = wants_dx ? call.output() : nothing(x);
    std::vector<double> sum_grad(C), sum_grad_xhat(C);
    task.dy = call.beside(dy);
    task.mean = statistics.data<double>(), task.rstd = task.mean + C;
    task.count = count_of(x, {});
    task.weight = weights, task.bias = biases;
    task.sum_grad = sum_grad.data(), task.sum_grad_xhat = sum_grad_xhat.data();
    task.output = wants_dx ? dx.data<void>() : nullptr;
    if (!wants_dx) task.verb = Verb::reduce_grad;
    call.run();
    stack[0] = dx.release();
    stack[1] = (weight ? rounded(sum_grad_xhat, weight) : nothing(x)).release();
    stack[2] = (weight ? rounded(sum_grad, weight) : nothing(x)).release();
}

}  // namespace
