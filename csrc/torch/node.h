// A training step within a node of torch's own. Torch's C++ has the autograd node of `aten::cudnn_batch_norm` for tensors on every device,
// and kernels of it for CUDA alone; these are the CPU's. A node in Python takes as long as the arithmetic of ten thousand values, and a node
// in C++ of our own would have to be compiled for each version of torch.
//
// The node saves x, the weight, and what the forward returns beside y: mean and rstd in the dtype in which torch computes, for its own rules,
// and `reserve`, which is mean, rstd and M2 in float64 and then the number of values of a channel. It has no running statistics: the
// operator `update_after` updates them.
#pragma once

#include "torch/steps.h"

namespace {

// What `reserve` holds for C channels.
struct Reserve {
    double *mean, *rstd, *m2, *count;

    static bool fits(const Tensor& reserve, int64_t C) {
        const bool is_vector = reserve.dtype == dtypes[(int)Dtype::float64] && reserve.rank == 1 && reserve.is_contiguous();
        return is_vector && reserve.sizes[0] == size(C);
    }
    static int64_t size(int64_t C) { return 3 * C + 1; }
    Reserve(const Tensor& reserve, int64_t C) : mean(reserve.data<double>()), rstd(mean + C), m2(rstd + C), count(m2 + C) {}
};

// Whether torch's node passes dy in x's layout. For channels_last it asks for that memory format, which `vmap` over dy cannot; torch also
// takes some tensors of one channel, or of planes of one value, for channels_last.
inline bool has_planar_gradient(const Tensor& x) {
    if (!Layout(x).planar || x.rank < 4 || x.strides[1] > 1) return Layout(x).planar;
    for (int axis = 2; axis < x.rank; ++axis)
        if (x.sizes[axis] > 1 || x.strides[axis] != 1) return false;
    return true;
}

// aten::cudnn_batch_norm. If it does not take the call, y is empty and nothing was written.
void forward_of_node(StableIValue* stack, uint64_t count, uint64_t) {
    Arguments arguments(stack, count,
                        "Tensor x, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, float momentum, "
                        "float eps");
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
    Tensor y = call.output(), reserve = Tensor::vector(Reserve::size(C), dtypes[(int)Dtype::float64]);
    const Reserve statistics(reserve, C);
    Task& task = call.task;
    task.eps = eps, task.weight = weights, task.bias = biases;
    task.output = y.data<void>();
    task.mean = statistics.mean, task.rstd = statistics.rstd, task.m2 = statistics.m2;
    task.count = *statistics.count = count_of(x, {});
    call.run();
    const int32_t wide = dtypes[(int)(task.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32)];
    stack[0] = y.release(), stack[3] = reserve.release();
    stack[1] = rounded(statistics.mean, C, wide).release(), stack[2] = rounded(statistics.rstd, C, wide).release();
}

// dx, dweight and dbias. The arguments are those of aten::cudnn_batch_norm_backward.
OPERATOR(node_backward,
         "Tensor x, Tensor dy, Tensor weight, Tensor? running_mean, Tensor? running_var, Tensor? mean, Tensor? rstd, float eps, "
         "Tensor reserve",
         "(Tensor, Tensor, Tensor)") {
    const Tensor x = arguments.tensor();
    Tensor dy = arguments.tensor();
    const Tensor weight = arguments.tensor();
    for (int number = 0; number < 4; ++number) arguments.skip_optional();
    arguments.number();
    const Tensor reserve = arguments.tensor();
    Call call(Verb::backward, x);
    const int64_t C = x.sizes[1];
    expect(Reserve::fits(reserve, C) && is_float32_or_float64(weight) && x.values() > 0,
           "torch's node takes what our forward on the CPU left");
    const Reserve statistics(reserve, C);
    const ChannelOperand weights(weight, C);
    const Scratch sum_grad = scratch(C), sum_grad_xhat = scratch(C);
    Tensor dx = call.output();
    Task& task = call.task;
    task.dy = call.in_layout_of_x(dy);
    task.mean = statistics.mean, task.rstd = statistics.rstd;
    task.count = count_of(x, {});
    task.weight = weights;
    task.sum_grad = sum_grad.get(), task.sum_grad_xhat = sum_grad_xhat.get();
    task.output = dx.data<void>();
    call.run();
    stack[0] = dx.release();
    stack[1] = rounded(sum_grad_xhat.get(), C, weight.dtype).release(), stack[2] = rounded(sum_grad.get(), C, weight.dtype).release();
}

// The same above the kernels: if the backward is itself recorded, by operations that can be differentiated to any order. Torch's formula for
// the second derivative takes mean and rstd for constants. Ours is in Python (functional/autograd.py).
void backward_under_autograd(StableIValue* stack, uint64_t, uint64_t) {
    const char* const name = aoti_torch_grad_mode_is_enabled() ? "batchnorm::differentiable_node_backward" : "batchnorm::node_backward";
    check(aoti_torch_call_dispatcher(name, "", stack), "compute the backward of a step");
}

constexpr struct {
    const char *name, *key;
    Run run;
} of_torchs_node[] = {{"cudnn_batch_norm", "CPU", forward_of_node},
                      {"cudnn_batch_norm_backward", "CPU", node_backward},
                      {"cudnn_batch_norm_backward", "AutogradCPU", backward_under_autograd}};

// Whether it takes the call; if not, nothing was written.
OPERATOR(update_after, "Tensor reserve, " RUNNING_ARGUMENTS ", " UPDATE_ARGUMENTS, "bool") {
    const Tensor reserve = arguments.tensor();
    const Running running(arguments);
    const Update update(arguments);
    const int64_t C = running.mean.rank == 1 ? running.mean.sizes[0] : 0;
    const bool takes = C > 0 && running.fit(C) && Reserve::fits(reserve, C);
    if (takes) {
        const Reserve statistics(reserve, C);
        running.update_by({statistics.mean, statistics.m2, C, *statistics.count}, update);
    }
    stack[0] = takes;
}

}  // namespace
