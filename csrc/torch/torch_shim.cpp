// The verbs as operators of torch's dispatcher, without torch's headers: the functions of its stable C interface
// (torch/csrc/inductor/aoti_torch/c/shim.h and torch/csrc/stable/c/shim.h, kept from release to release) are looked up in the
// libtorch_cpu that `import torch` loaded. One library serves every torch from 2.11 and every Python. kernels/cpu.py has the schemas.
//
// An operator receives its arguments as 64-bit words: a tensor is an owned handle, an optional one a pointer to such a word or null,
// numbers lie in their low bytes. It leaves its results in the same place.
#include <dlfcn.h>
#include <sys/mman.h>

#include "torch/tensors.h"

namespace {

// Fresh memory of several megabytes comes without pages, and a fault for every 4 KB costs more than the kernel: 103 MB took 40 to
// 80 ms of faults, 9 ms with huge pages. Memory that the allocator reuses has its pages, and the call then costs a microsecond.
constexpr int64_t bytes_worth_huge_pages = 4 << 20;
constexpr uint64_t huge_page = 2 << 20;

// Outputs below fit the cache, where the next operator finds them.
constexpr int64_t bytes_worth_streaming = 8 << 20;

void use_huge_pages(const Tensor& tensor, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (bytes < bytes_worth_huge_pages) return;
    const uint64_t start = (uint64_t)tensor.data<void>();
    const uint64_t from = (start + huge_page - 1) / huge_page * huge_page, to = (start + bytes) / huge_page * huge_page;
    if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);  // advice: it may be declined
#else
    (void)tensor, (void)bytes;
#endif
}

// How x lies in memory. One channel, or planes of one value, make the layouts the same.
struct Layout {
    bool planar = true, interleaved = true;

    explicit Layout(const Tensor& x) {
        if (x.sizes[1] > 1) interleaved = x.strides[1] == 1;
        int64_t planar_stride = 1, interleaved_stride = x.sizes[1];
        for (int axis = x.rank - 1; axis >= 0; --axis) {
            const bool any_stride = x.sizes[axis] == 1;
            planar &= any_stride || x.strides[axis] == planar_stride;
            planar_stride *= x.sizes[axis];
            if (axis == 1) continue;
            interleaved &= any_stride || x.strides[axis] == interleaved_stride;
            interleaved_stride *= x.sizes[axis];
        }
    }
};

// One call on x: its sizes and layout, and what is read and written beside it.
class Call {
  public:
    Call(Verb verb, const Tensor& x) : x(x) {
        expect(x.rank >= 2, "x must be (N, C, *S)");
        task.verb = verb;
        task.dtype = dtype_of(x);
        task.x = x.data<void>();
        task.N = x.sizes[0], task.C = x.sizes[1], task.S = 1;
        for (int axis = 2; axis < x.rank; ++axis) task.S *= x.sizes[axis];
        if (x.values() > 0) set_layout();
        uint32_t threads = 1;
        torch_get_num_threads(&threads);
        task.threads = (int)threads;
    }

    // `tensor` where it lies as x does; otherwise a copy that does.
    const void* beside(Tensor& tensor) {
        if (!tensor) return nullptr;
        if (!tensor.lies_as(x)) {
            expect(tensor.has_sizes_of(x) && is_floating(tensor.dtype), "dy and the residual must be as x");
            Tensor copy = x.empty_like();
            use_huge_pages(copy, copy.values() * element_size());
            check(aoti_torch_copy_(copy.handle, tensor.handle, 0), "copy a tensor to the layout of another");
            tensor = static_cast<Tensor&&>(copy);
        }
        return tensor.data<void>();
    }
    // To be called before smaller tensors are allocated: they would be cut from what the last call's output left, and this one would
    // lie elsewhere, out of the cache.
    Tensor output() {
        Tensor tensor = x.empty_like();
        const int64_t bytes = tensor.values() * element_size();
        use_huge_pages(tensor, bytes);
        task.stream = bytes >= bytes_worth_streaming;
        return tensor;
    }
    void set_mask(const Tensor& mask) {
        if (!mask) return;
        const int64_t positions = x.sizes[1] ? x.values() / x.sizes[1] : 0;
        expect(mask.dtype == boolean && mask.is_contiguous(), "the mask must be bool, without gaps");
        expect(!positions || mask.values() == positions, "the mask must be (N, 1, *S)");
        task.mask = mask.data<uint8_t>();
    }
    void set_activation(Arguments& arguments) {
        const int64_t code = arguments.integer();
        expect(code >= 0 && code <= (int64_t)Activation::gelu_tanh, "there is no such activation");
        task.activation = (Activation)code;
        task.slope = arguments.number();
    }
    // Groups of `size` samples, the last one of what is left.
    void set_groups(int64_t groups, int64_t size) {
        const int64_t N = x.sizes[0];
        expect(groups >= 1 && size >= 1 && (!N || (groups <= N && size <= N && (groups - 1) * size < N)), "groups must divide the samples");
        task.groups = groups, task.group_size = size;
        if (task.C == 1 && x.values() > 0) task.N = x.sizes[0], task.S /= task.N;
    }
    void run() {
        if (x.values() > 0) batchnorm::run(task);
    }

    Task task = {};

  private:
    const Tensor& x;

    static Dtype dtype_of(const Tensor& x) {
        for (int dtype = 0; dtype < 4; ++dtype)
            if (x.dtype == dtypes[dtype]) return (Dtype)dtype;
        throw std::runtime_error("batchnorm: the CPU kernels take float32, float64, bfloat16 and float16");
    }
    int64_t element_size() const {
        return task.dtype == Dtype::float64 ? 8 : task.dtype == Dtype::float32 ? 4 : 2;
    }

    void set_layout() {
        const Layout layout(x);
        if (!layout.planar && !layout.interleaved)
            throw std::runtime_error("batchnorm: the CPU kernels take x as (N, C, *S) or as (N, *S, C) in memory, without gaps");
        task.interleaved = task.C > 1 && (!layout.planar || task.S == 1);
        if (task.C == 1) task.S *= task.N, task.N = 1;
    }
};

// weight, bias, residual, mask, activation, slope, residual_is_output: the end of every verb's arguments but those of `moments`.
struct Epilogue {
    Tensor weight, bias, residual, mask;
    ChannelValues weights, biases;

    Epilogue(Arguments& arguments, int64_t C, Call& call)
        : weight(arguments.optional_tensor()),
          bias(arguments.optional_tensor()),
          residual(arguments.optional_tensor()),
          mask(arguments.optional_tensor()),
          weights(weight, C),
          biases(bias, C) {
        call.task.weight = weights;
        call.task.bias = biases;
        call.task.residual = call.beside(residual);
        call.set_mask(mask);
        call.set_activation(arguments);
    }
};

// Values per channel: those of x, or those the mask counts.
double count_of(const Tensor& x, const Tensor& masked_count) {
    if (masked_count) return ChannelValues::number(masked_count);
    return x.sizes[1] ? (double)(x.values() / x.sizes[1]) : 0.0;
}

Tensor channel_vector(const Tensor& x) {
    Tensor vector = Tensor::vector(x.sizes[1], dtypes[(int)Dtype::float64]);
    if (!x.values()) memset(vector.data<double>(), 0, x.sizes[1] * sizeof(double));
    return vector;
}

Tensor nothing(const Tensor& x) { return Tensor::vector(0, x.dtype); }

void moments(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Tensor x = arguments.tensor(), mask = arguments.optional_tensor(), count = arguments.optional_tensor();
    Call call(Verb::moments, x);
    Tensor mean = channel_vector(x), m2 = channel_vector(x);
    call.set_mask(mask);
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
    void run(Arguments& arguments, Word* stack) {
        const Epilogue epilogue(arguments, x.sizes[1], call);
        Tensor mean = channel_vector(x), m2 = channel_vector(x), rstd = channel_vector(x);
        call.task.output = y.data<void>();
        call.task.mean = mean.data<double>(), call.task.m2 = m2.data<double>(), call.task.rstd = rstd.data<double>();
        call.run();
        stack[0] = y.release(), stack[1] = mean.release(), stack[2] = m2.release(), stack[3] = rstd.release();
    }
};

void forward(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    ForwardCall(arguments).run(arguments, stack);
}

void forward_renormalized(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    ForwardCall forward(arguments);
    const Tensor running_mean = arguments.tensor(), running_var = arguments.tensor();
    const Tensor r_max = arguments.tensor(), d_max = arguments.tensor();
    const ChannelValues means(running_mean, forward.x.sizes[1]), variances(running_var, forward.x.sizes[1]);
    Tensor r = channel_vector(forward.x), d = channel_vector(forward.x);
    Task& task = forward.call.task;
    task.running_mean = means, task.running_var = variances;
    task.r_max = ChannelValues::number(r_max), task.d_max = ChannelValues::number(d_max);
    task.r = r.data<double>(), task.d = d.data<double>();
    forward.run(arguments, stack);
    stack[4] = r.release(), stack[5] = d.release();
}

// (G, C)
Tensor group_vectors(const Tensor& x, int64_t groups) {
    const int64_t sizes[] = {groups, x.sizes[1]}, strides[] = {x.sizes[1], 1};
    Tensor vectors = Tensor::empty(2, sizes, strides, dtypes[(int)Dtype::float64]);
    if (!x.values()) memset(vectors.data<double>(), 0, vectors.values() * sizeof(double));
    return vectors;
}

void forward_groups(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
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

void normalize(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
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

void set_constant(Task& task, const Tensor& running_mean, const Tensor& running_var, double eps, int64_t C) {
    const ChannelValues means(running_mean, C), variances(running_var, C);
    for (int64_t c = 0; c < C; ++c) task.mean[c] = means[c], task.rstd[c] = 1.0 / __builtin_sqrt(variances[c] + eps);
}

void infer(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const Tensor x = arguments.tensor(), running_mean = arguments.tensor(), running_var = arguments.tensor();
    const double eps = arguments.number();
    const int64_t C = x.sizes[1];
    Call call(Verb::normalize, x);
    Tensor y = call.output();
    Tensor mean = Tensor::vector(C, dtypes[(int)Dtype::float64]), rstd = Tensor::vector(C, dtypes[(int)Dtype::float64]);
    call.task.mean = mean.data<double>(), call.task.rstd = rstd.data<double>();
    set_constant(call.task, running_mean, running_var, eps, C);
    const Epilogue epilogue(arguments, C, call);
    call.task.output = y.data<void>();
    call.run();
    stack[0] = y.release(), stack[1] = mean.release(), stack[2] = rstd.release();
}

// What the three verbs of the backward share: dy, x, mean, rstd first, the epilogue last.
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
        call.task.dy = call.beside(dy);
        call.task.mean = means, call.task.rstd = rstds;
    }
};

void reduce_grad(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
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

void input_grad(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    BackwardCall backward(Verb::input_grad, arguments);
    const Tensor& x = backward.x;
    const Tensor mean_grad = arguments.optional_tensor(), mean_grad_xhat = arguments.optional_tensor();
    const ChannelValues mean_grads(mean_grad, x.sizes[1]), mean_grad_xhats(mean_grad_xhat, x.sizes[1]);
    Task& task = backward.call.task;
    task.mean_grad = mean_grads, task.mean_grad_xhat = mean_grad_xhats;
    const Epilogue epilogue(arguments, x.sizes[1], backward.call);
    task.residual_is_output = arguments.flag();
    const bool wants_dresidual = arguments.flag();
    Tensor dx = backward.call.output(), dresidual = wants_dresidual ? backward.call.output() : nothing(x);
    task.output = dx.data<void>();
    task.dresidual = wants_dresidual ? dresidual.data<void>() : nullptr;
    backward.call.run();
    stack[0] = dx.release(), stack[1] = dresidual.release();
}

void backward(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
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

void backward_groups(Word* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    Tensor dy = arguments.tensor();
    const Tensor x = arguments.tensor(), mean = arguments.tensor(), rstd = arguments.tensor();
    const int64_t groups = arguments.integer(), size = arguments.integer();
    Call call(Verb::backward, x);
    for (const Tensor* given : {&mean, &rstd}) {
        const bool fits = given->dtype == dtypes[(int)Dtype::float64] && given->is_contiguous() && given->rank == 2;
        expect(fits && given->sizes[0] == groups && given->sizes[1] == x.sizes[1], "the statistics of groups must be (G, C) in float64");
    }
    call.set_groups(groups, size);
    call.task.dy = call.beside(dy);
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

// running = (1 - momentum) · running + momentum · batch, for both buffers or, if the batch's would not be finite, for neither.
template <class Real>
bool move(const Tensor& running_mean, const Tensor& running_var, const double* mean, const double* m2, int64_t C,
          double divisor, double momentum, bool moves, bool skip_nonfinite) {
    const Scratch variances = scratch(C);
    double* variance = variances.get();
    int bad = 0;
#pragma omp simd reduction(| : bad)
    for (int64_t c = 0; c < C; ++c) {
        variance[c] = m2[c] / divisor;
        const Real narrow_mean = (Real)mean[c], narrow_variance = (Real)variance[c];
        bad |= !(narrow_mean - narrow_mean == 0) | !(narrow_variance - narrow_variance == 0);
    }
    if (!moves || (skip_nonfinite && bad)) return !bad;
    const auto follow = [&](const Tensor& running, const double* batch) {
        Real* values = running.data<Real>();
        const auto step = [&](Real value, double next) { return (Real)((1.0 - momentum) * (double)value + momentum * next); };
        if (const int64_t stride = running.strides[0]; stride != 1) {
            for (int64_t c = 0; c < C; ++c) values[c * stride] = step(values[c * stride], batch[c]);
            return;
        }
#pragma omp simd
        for (int64_t c = 0; c < C; ++c) values[c] = step(values[c], batch[c]);
    };
    follow(running_mean, mean), follow(running_var, variance);
    return !bad;
}

// A layer's buffers, and how they follow the batches.
struct Running {
    Tensor mean, variance, moved_batches, nonfinite_batches;

    explicit Running(Arguments& arguments)
        : mean(arguments.tensor()),
          variance(arguments.tensor()),
          moved_batches(arguments.optional_tensor()),
          nonfinite_batches(arguments.optional_tensor()) {}

    // They are written where they lie.
    void check(int64_t C) const {
        for (const Tensor* running : {&mean, &variance}) {
            expect(running->rank == 1 && running->sizes[0] == C, "running statistics must be (C,)");
            expect(running->dtype == mean.dtype, "running statistics must have one dtype");
        }
        const int32_t dtype = mean.dtype;
        expect(dtype == dtypes[(int)Dtype::float32] || dtype == dtypes[(int)Dtype::float64], "running statistics must be float32 or float64");
        for (const Tensor* counter : {&moved_batches, &nonfinite_batches})
            expect(!*counter || (counter->dtype == int64 && counter->values() == 1), "a counter must be one int64");
    }

    // Moves them by one batch and counts it; whether its statistics were finite.
    bool follow(const double* batch_mean, const double* m2, int64_t C, double count, bool moves, double momentum,
                bool unbiased, bool skip_nonfinite) {
        const double divisor = unbiased ? count - 1.0 : count;
        const auto step = mean.dtype == dtypes[(int)Dtype::float32] ? move<float> : move<double>;
        const bool finite = step(mean, variance, batch_mean, m2, C, divisor > 1.0 ? divisor : 1.0, momentum, moves, skip_nonfinite);
        if (moved_batches && moves && (finite || !skip_nonfinite)) ++*moved_batches.data<int64_t>();
        if (nonfinite_batches && skip_nonfinite && !finite) ++*nonfinite_batches.data<int64_t>();
        return finite;
    }
};

void update_running(Word* stack, uint64_t, uint64_t) {
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
        running.follow(means, m2s, C, count, !masked_count || count > 1.0, momentum, unbiased, skip_nonfinite);
    stack[0] = finite.release();
}

}  // namespace

#include "torch/steps.h"

namespace {

const struct {
    const char* name;
    void (*run)(Word*, uint64_t, uint64_t);
} operators[] = {
    {"moments", moments},         {"normalize", normalize}, {"infer", infer}, {"reduce_grad", reduce_grad},
    {"input_grad", input_grad},   {"forward", forward},     {"backward", backward},
    {"update_running", update_running},
    {"training_step", training_step<false>},
    {"renormalization_step", training_step<true>},
    {"forward_renormalized", forward_renormalized},
    {"forward_groups", forward_groups}, {"backward_groups", backward_groups},
    {"training_step_backward", step_backward<false>},
    {"inference_step", inference_step},
    {"inference_step_backward", step_backward<true>},
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Registers the operators, whose schemas must be defined. Null, or what is missing.
EXPORT const char* batchnorm_register() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    if (!torch) torch = dlopen("libtorch_cpu.dylib", RTLD_NOLOAD | RTLD_LAZY);
    if (!torch) return "libtorch_cpu is not loaded";
#define LOOK_UP(name, ...) \
    if (!(*(void**)&name = dlsym(torch, #name))) return "torch has no " #name;
    TORCH_FUNCTIONS(LOOK_UP)
#undef LOOK_UP
    *(void**)&torch_delete_stable_ivalue = dlsym(torch, "torch_delete_stable_ivalue");
    cpu = aoti_torch_device_type_cpu();
    dtypes[(int)Dtype::float32] = aoti_torch_dtype_float32();
    dtypes[(int)Dtype::float64] = aoti_torch_dtype_float64();
    dtypes[(int)Dtype::bfloat16] = aoti_torch_dtype_bfloat16();
    dtypes[(int)Dtype::float16] = aoti_torch_dtype_float16();
    boolean = aoti_torch_dtype_bool();
    int64 = aoti_torch_dtype_int64();
    Handle library = nullptr;  // lives as long as the process
    if (aoti_torch_library_init_impl("batchnorm", "CPU", "torch_shim.cpp", __LINE__, &library))
        return "torch refused to extend the operator library";
    for (const auto& entry : operators)
        if (aoti_torch_library_impl(library, entry.name, entry.run)) return "torch refused an operator";
    return nullptr;
}

EXPORT const char* batchnorm_instruction_set() { return instruction_set(); }

EXPORT const char* batchnorm_build_name(int number) { return build_name(number); }
