// A training step within a node of torch's own. Torch's C++ has the autograd node of `aten::cudnn_batch_norm` for tensors on every device,
// and kernels of it for CUDA alone; these are the CPU's. A node in Python takes as long as the arithmetic of ten thousand values, and a node
// in C++ of our own would have to be compiled for each version of torch.
//
// The node saves x, the weight, mean and rstd, and of its four outputs differentiates y. It has no running statistics: the operator
// `update_after` updates them by what the node leaves in `reserve`, M2 of each channel and then the number of values of a channel.
#pragma once

#include "torch/steps.h"

namespace {

inline void expect_statistics(const Tensor& statistics, int64_t size) {
    const bool fit = statistics.dtype == dtypes[(int)Dtype::float64] && statistics.rank == 1 && statistics.sizes[0] == size;
    expect(fit && statistics.is_contiguous(), "the statistics of a step in torch's node must be (C,) in float64");
}

// Whether torch's node passes dy in x's layout. For channels_last it asks for that memory format, which `vmap` over dy cannot; torch takes
// some images of one channel for channels_last.
inline bool has_planar_gradient(const Tensor& x) { return Layout(x).planar && (x.rank < 4 || x.sizes[1] > 1 || x.strides[1] > 1); }

// aten::cudnn_batch_norm. If it does not take the call, y is empty and nothing was written.
void forward_of_node(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Tensor x = arguments.tensor(), weight = arguments.tensor(), bias = arguments.optional_tensor();
    const bool has_mean = arguments.skip_optional(), has_variance = arguments.skip_optional(), training = arguments.flag();
    arguments.number();
    const double eps = arguments.number();
    expect(training && !has_mean && !has_variance, "on the CPU aten::cudnn_batch_norm trains, without running statistics");
    const Tensor none;
    if (!trains_on_fast_path(x, weight, bias, none, eps) || !has_planar_gradient(x)) {
        // Not in x's dtype: the node takes none that is complex.
        for (int output = 0; output < 4; ++output) stack[output] = Tensor::vector(0, dtypes[(int)Dtype::float64]).release();
        return;
    }
    const int64_t C = x.sizes[1];
    const ChannelOperand weights(weight, C), biases(bias, C);
    Call call(Verb::forward, x);
    Tensor y = call.output(), mean = channel_vector(x), rstd = channel_vector(x);
    Tensor reserve = Tensor::vector(C + 1, dtypes[(int)Dtype::float64]);
    Task& task = call.task;
    task.eps = eps, task.weight = weights, task.bias = biases;
    task.output = y.data<void>();
    task.mean = mean.data<double>(), task.rstd = rstd.data<double>(), task.m2 = reserve.data<double>();
    task.count = task.m2[C] = count_of(x, {});
    call.run();
    stack[0] = y.release(), stack[1] = mean.release(), stack[2] = rstd.release(), stack[3] = reserve.release();
}

// aten::cudnn_batch_norm_backward: dx, dweight and dbias.
void backward_of_node(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Tensor x = arguments.tensor();
    Tensor dy = arguments.tensor();
    const Tensor weight = arguments.tensor();
    arguments.skip_optional(), arguments.skip_optional();
    const Tensor mean = arguments.optional_tensor(), rstd = arguments.optional_tensor();
    arguments.number();
    const Tensor reserve = arguments.tensor();
    Call call(Verb::backward, x);
    const int64_t C = x.sizes[1];
    expect(mean && rstd && is_float32_or_float64(weight), "aten::cudnn_batch_norm_backward takes what its forward on the CPU left");
    expect_statistics(mean, C), expect_statistics(rstd, C);
    const ChannelOperand weights(weight, C);
    const Scratch sum_grad = scratch(C), sum_grad_xhat = scratch(C);
    Tensor dx = call.output();
    Task& task = call.task;
    task.dy = call.in_layout_of_x(dy);
    task.mean = mean.data<double>(), task.rstd = rstd.data<double>();
    task.count = count_of(x, {});
    task.weight = weights;
    task.sum_grad = sum_grad.get(), task.sum_grad_xhat = sum_grad_xhat.get();
    task.output = dx.data<void>();
    call.run();
    stack[0] = dx.release(), stack[1] = rounded(sum_grad_xhat, C, weight).release(), stack[2] = rounded(sum_grad, C, weight).release();
}

constexpr struct {
    const char* name;
    Run run;
} of_torchs_node[] = {{"cudnn_batch_norm", forward_of_node}, {"cudnn_batch_norm_backward", backward_of_node}};

// Whether it takes the call; if not, nothing was written.
OPERATOR(update_after, RUNNING_ARGUMENTS ", Tensor mean, Tensor reserve, " UPDATE_ARGUMENTS, "bool") {
    Arguments arguments(stack);
    const Running running(arguments);
    const Tensor mean = arguments.tensor(), reserve = arguments.tensor();
    const Update update(arguments);
    expect(mean.rank == 1, "the statistics of a step in torch's node must be (C,) in float64");
    const int64_t C = mean.sizes[0];
    expect_statistics(mean, C), expect_statistics(reserve, C + 1);
    const bool takes = running.fit(C);
    const double* const m2 = reserve.data<double>();
    if (takes) running.update_by({mean.data<double>(), m2, C, m2[C]}, update);
    stack[0] = takes;
}

}  // namespace
