// The functions of kernels/contract.py as torch operators.
#pragma once

#include "torch/call.h"

namespace {

OPERATOR(moments, "Tensor x, Tensor? mask, Tensor? count, Tensor? weights", "(Tensor, Tensor)") {
    const Tensor x = arguments.tensor(), mask = arguments.optional_tensor(), count = arguments.optional_tensor();
    const Tensor weights = arguments.optional_tensor();
    Call call(Verb::moments, x);
    Tensor mean = channel_vector(x), m2 = channel_vector(x);
    call.set_mask(mask);
    call.set_weights(weights);
    call.task.count = count_of(x, count);
    call.task.mean = mean.data<double>(), call.task.m2 = m2.data<double>();
    call.run();
    stack[0] = mean.release(), stack[1] = m2.release();
}

struct ForwardCall {
    const Tensor x, count;
    Call call;
    Tensor y;

    explicit ForwardCall(Arguments& arguments)
        : x(arguments.tensor()), count(arguments.optional_tensor()), call(Verb::forward, x), y(call.output()) {
        call.task.count = count_of(x, count);
        call.task.eps = arguments.number();
    }
    // y, mean, M2 and rstd.
    void run(Arguments& arguments, StableIValue* stack) {
        const Epilogue epilogue(arguments, x.sizes[1], call);
        Tensor mean = channel_vector(x), m2 = channel_vector(x), rstd = channel_vector(x);
        call.task.output = y.data<void>();
        call.task.mean = mean.data<double>(), call.task.m2 = m2.data<double>(), call.task.rstd = rstd.data<double>();
        call.run();
        stack[0] = y.release(), stack[1] = mean.release(), stack[2] = m2.release(), stack[3] = rstd.release();
    }
};

OPERATOR(forward, "Tensor x, Tensor? count, float eps, " EPILOGUE_ARGUMENTS, "(Tensor, Tensor, Tensor, Tensor)") {
    ForwardCall(arguments).run(arguments, stack);
}

OPERATOR(forward_renormalized,
         "Tensor x, Tensor? count, float eps, Tensor running_mean, Tensor running_var, Tensor r_max, Tensor d_max, " EPILOGUE_ARGUMENTS,
         "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)") {
    ForwardCall forward(arguments);
    const Tensor running_mean = arguments.tensor(), running_var = arguments.tensor();
    const Tensor r_max = arguments.tensor(), d_max = arguments.tensor();
    const ChannelOperand means(running_mean, forward.x.sizes[1]), variances(running_var, forward.x.sizes[1]);
    Tensor r = channel_vector(forward.x), d = channel_vector(forward.x);
    Task& task = forward.call.task;
    task.running_mean = means, task.running_var = variances;
    task.r_max = ChannelValues::number(r_max), task.d_max = ChannelValues::number(d_max);
    task.r = r.data<double>(), task.d = d.data<double>();
    forward.run(arguments, stack);
    stack[4] = r.release(), stack[5] = d.release();
}
OPERATOR(forward_groups, "Tensor x, int groups, int size, float eps, " EPILOGUE_ARGUMENTS, "(Tensor, Tensor, Tensor, Tensor, Tensor)") {
    const Tensor x = arguments.tensor();
    const int64_t groups = arguments.integer(), size = arguments.integer();
    Call call(Verb::forward, x);
    call.set_groups(groups, size);
    call.task.eps = arguments.number();
    const Epilogue epilogue(arguments, x.sizes[1], call);
    Tensor y = call.output(), counts = Tensor::vector(groups, dtypes[(int)Dtype::float64]);
    Tensor mean = group_vectors(x, groups), m2 = group_vectors(x, groups), rstd = group_vectors(x, groups);
    if (!x.values()) memset(counts.data<double>(), 0, groups * sizeof(double));
    call.task.output = y.data<void>(), call.task.counts = counts.data<double>();
    call.task.mean = mean.data<double>(), call.task.m2 = m2.data<double>(), call.task.rstd = rstd.data<double>();
    call.run();
    stack[0] = y.release(), stack[1] = counts.release();
    stack[2] = mean.release(), stack[3] = m2.release(), stack[4] = rstd.release();
}

OPERATOR(normalize, "Tensor x, Tensor mean, Tensor rstd, " EPILOGUE_ARGUMENTS, "Tensor") {
    const Tensor x = arguments.tensor(), mean = arguments.tensor(), rstd = arguments.tensor();
    Call call(Verb::normalize, x);
    const ChannelValues means(mean, x.sizes[1]), rstds(rstd, x.sizes[1]);
    call.task.mean = means, call.task.rstd = rstds;
    const Epilogue epilogue(arguments, x.sizes[1], call);
    Tensor y = call.output();
    call.task.output = y.data<void>();
    call.run();
    stack[0] = y.release();
}

OPERATOR(infer, "Tensor x, Tensor running_mean, Tensor running_var, float eps, " EPILOGUE_ARGUMENTS, "(Tensor, Tensor, Tensor)") {
    const Tensor x = arguments.tensor(), running_mean = arguments.tensor(), running_var = arguments.tensor();
    const double eps = arguments.number();
    const int64_t C = x.sizes[1];
    Call call(Verb::normalize, x);
    Tensor y = call.output();
    Tensor mean = channel_vector(x), rstd = channel_vector(x);
    call.task.mean = mean.data<double>(), call.task.rstd = rstd.data<double>();
    const Constants constants(call.task, running_mean, running_var, eps, C);
    const Epilogue epilogue(arguments, C, call);
    call.task.output = y.data<void>();
    call.run();
    stack[0] = y.release(), stack[1] = mean.release(), stack[2] = rstd.release();
}

// The arguments that the verbs of the backward share: dy, x, mean and rstd.
struct BackwardCall {
    Tensor dy, x, mean, rstd;
    Call call;
    ChannelValues means, rstds;

    BackwardCall(Verb verb, Arguments& arguments)
        : dy(arguments.tensor()),
          x(arguments.tensor()),
          mean(arguments.tensor()),
          rstd(arguments.tensor()),
          call(verb, x),
          means(mean, x.sizes[1]),
          rstds(rstd, x.sizes[1]) {
        call.task.dy = call.in_layout_of_x(dy);
        call.task.mean = means, call.task.rstd = rstds;
    }
};

OPERATOR(reduce_grad, "Tensor dy, Tensor x, Tensor mean, Tensor rstd, " EPILOGUE_ARGUMENTS ", bool residual_is_output",
         "(Tensor, Tensor)") {
    BackwardCall backward(Verb::reduce_grad, arguments);
    const Tensor& x = backward.x;
    const Epilogue epilogue(arguments, x.sizes[1], backward.call);
    backward.call.task.residual_is_output = arguments.flag();
    Tensor sum_grad = channel_vector(x), sum_grad_xhat = channel_vector(x);
    backward.call.task.sum_grad = sum_grad.data<double>();
    backward.call.task.sum_grad_xhat = sum_grad_xhat.data<double>();
    backward.call.run();
    stack[0] = sum_grad.release(), stack[1] = sum_grad_xhat.release();
}

OPERATOR(input_grad,
         "Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? mean_grad, Tensor? mean_grad_xhat, Tensor? weights, " EPILOGUE_ARGUMENTS
         ", bool residual_is_output, bool wants_dresidual",
         "(Tensor, Tensor)") {
    BackwardCall backward(Verb::input_grad, arguments);
    const Tensor& x = backward.x;
    const Tensor mean_grad = arguments.optional_tensor(), mean_grad_xhat = arguments.optional_tensor();
    const Tensor weights = arguments.optional_tensor();
    const ChannelValues mean_grads(mean_grad, x.sizes[1]), mean_grad_xhats(mean_grad_xhat, x.sizes[1]);
    Task& task = backward.call.task;
    task.mean_grad = mean_grads, task.mean_grad_xhat = mean_grad_xhats;
    const Epilogue epilogue(arguments, x.sizes[1], backward.call);
    backward.call.set_weights(weights);
    task.residual_is_output = arguments.flag();
    const bool wants_dresidual = arguments.flag();
    Tensor dx = backward.call.output(), dresidual = wants_dresidual ? backward.call.output() : nothing(x);
    task.output = dx.data<void>();
    task.dresidual = wants_dresidual ? dresidual.data<void>() : nullptr;
    backward.call.run();
    stack[0] = dx.release(), stack[1] = dresidual.release();
}

OPERATOR(backward,
         "Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? count, bool constant_statistics, " EPILOGUE_ARGUMENTS
         ", bool residual_is_output, bool wants_dresidual, bool wants_dx",
         "(Tensor, Tensor, Tensor, Tensor)") {
    BackwardCall backward(Verb::backward, arguments);
    const Tensor& x = backward.x;
    Task& task = backward.call.task;
    const Tensor masked_count = arguments.optional_tensor();
    const bool constant_statistics = arguments.flag();
    const Epilogue epilogue(arguments, x.sizes[1], backward.call);
    task.residual_is_output = arguments.flag();
    const bool wants_dresidual = arguments.flag(), wants_dx = arguments.flag();
    const double count = count_of(x, masked_count);
    task.count = constant_statistics ? 0.0 : count > 1.0 ? count : 1.0;
    Tensor dx = wants_dx ? backward.call.output() : nothing(x);
    Tensor dresidual = wants_dresidual ? backward.call.output() : nothing(x);
    Tensor sum_grad = channel_vector(x), sum_grad_xhat = channel_vector(x);
    task.sum_grad = sum_grad.data<double>(), task.sum_grad_xhat = sum_grad_xhat.data<double>();
    task.output = wants_dx ? dx.data<void>() : nullptr;
    task.dresidual = wants_dresidual ? dresidual.data<void>() : nullptr;
    if (!wants_dx && !wants_dresidual) task.verb = Verb::reduce_grad;
    backward.call.run();
    stack[0] = dx.release(), stack[1] = dresidual.release();
    stack[2] = sum_grad.release(), stack[3] = sum_grad_xhat.release();
}

OPERATOR(backward_groups,
         "Tensor dy, Tensor x, Tensor mean, Tensor rstd, int groups, int size, " EPILOGUE_ARGUMENTS
         ", bool residual_is_output, bool wants_dresidual, bool wants_dx",
         "(Tensor, Tensor, Tensor, Tensor)") {
    Tensor dy = arguments.tensor();
    const Tensor x = arguments.tensor(), mean = arguments.tensor(), rstd = arguments.tensor();
    const int64_t groups = arguments.integer(), size = arguments.integer();
    Call call(Verb::backward, x);
    for (const Tensor* given : {&mean, &rstd}) {
        const bool fits = given->dtype == dtypes[(int)Dtype::float64] && given->is_contiguous() && given->rank == 2;
        expect(fits && given->sizes[0] == groups && given->sizes[1] == x.sizes[1], "the statistics of groups must be (G, C) in float64");
    }
    call.set_groups(groups, size);
    call.task.dy = call.in_layout_of_x(dy);
    call.task.mean = mean.data<double>(), call.task.rstd = rstd.data<double>();
    const Epilogue epilogue(arguments, x.sizes[1], call);
    call.task.residual_is_output = arguments.flag();
    const bool wants_dresidual = arguments.flag(), wants_dx = arguments.flag();
    Tensor dx = wants_dx ? call.output() : nothing(x), dresidual = wants_dresidual ? call.output() : nothing(x);
    Tensor sum_grad = group_vectors(x, groups), sum_grad_xhat = group_vectors(x, groups);
    call.task.sum_grad = sum_grad.data<double>(), call.task.sum_grad_xhat = sum_grad_xhat.data<double>();
    call.task.output = wants_dx ? dx.data<void>() : nullptr;
    call.task.dresidual = wants_dresidual ? dresidual.data<void>() : nullptr;
    if (!wants_dx && !wants_dresidual) call.task.verb = Verb::reduce_grad;
    call.run();
    stack[0] = dx.release(), stack[1] = dresidual.release();
    stack[2] = sum_grad.release(), stack[3] = sum_grad_xhat.release();
}

}  // namespace
