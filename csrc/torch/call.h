// One call of a verb on torch's tensors: the pieces from which every operator fills a Task.
#pragma once

#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <optional>
#include <stdexcept>

#include "api.h"
#include "torch/tensors.h"

namespace {

// Newly mapped memory has no pages yet, and a page fault for every 4 KB costs more than the kernel: 103 MB took 40 to 80 ms of faults, 9 ms
// with huge pages. Memory that the allocator reuses has its pages; madvise then costs a microsecond.
constexpr int64_t bytes_worth_huge_pages = 4 << 20;
constexpr uint64_t huge_page = 2 << 20;

// But the host of a virtual machine may have taken back what was free, and then gives it in small pages: 26 MB took 33 ms, and 8 ms without
// huge pages, since small ones are soon used again. So one page of a tensor is tried, and after two slow ones none are asked for.
constexpr int64_t slow_page = 1500000;  // nanoseconds
constexpr int slow_pages_that_decide = 2;
std::atomic<int> slow_pages{0};

// Smaller outputs fit the cache, where the next operator finds them.
constexpr int64_t bytes_beyond_cache = 8 << 20;

#if defined(MADV_HUGEPAGE)
inline int64_t nanoseconds_of_thread() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}
#endif

// Asks for huge pages for a new tensor, whose values it may overwrite.
inline void use_huge_pages(const Tensor& tensor, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    if (bytes < bytes_worth_huge_pages || slow_pages.load(std::memory_order_relaxed) >= slow_pages_that_decide) return;
    const uint64_t start = (uint64_t)tensor.data<void>();
    const uint64_t from = (start + huge_page - 1) / huge_page * huge_page, to = (start + bytes) / huge_page * huge_page;
    if (from >= to) return;
    const uint64_t tried = to - huge_page;
    madvise((void*)tried, huge_page, MADV_HUGEPAGE);  // advice: it may be declined
    const int64_t before = nanoseconds_of_thread();
    *(volatile char*)tried = 0;
    if (nanoseconds_of_thread() - before > slow_page) {
        slow_pages.fetch_add(1, std::memory_order_relaxed);
    } else if (from < tried) {
        madvise((void*)from, tried - from, MADV_HUGEPAGE);
    }
#else
    (void)tensor, (void)bytes;
#endif
}

// The layout of x in memory. With one channel, or planes of one value, it is both.
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

// One call on x: a Task with its sizes and layout, to which the operator adds the other tensors.
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

    // The data of `tensor`, which becomes a copy in x's layout if it has another.
    const void* in_layout_of_x(Tensor& tensor) {
        if (!tensor) return nullptr;
        if (!tensor.has_layout_of(x)) {
            expect(tensor.has_sizes_of(x) && is_floating(tensor.dtype), "dy and the residual must be as x");
            Tensor copy = x.empty_like();
            use_huge_pages(copy, copy.values() * element_size(task.dtype));
            check(aoti_torch_copy_(copy.handle, tensor.handle, 0), "copy a tensor to the layout of another");
            tensor = static_cast<Tensor&&>(copy);
        }
        return tensor.data<void>();
    }
    // A new tensor like x. To be called before smaller tensors are allocated: they would take a piece of the memory that the last call's
    // output left in the cache, and this one would get other memory.
    Tensor output() {
        Tensor tensor = x.empty_like();
        const int64_t bytes = tensor.values() * element_size(task.dtype);
        use_huge_pages(tensor, bytes);
        task.from_memory = bytes >= bytes_beyond_cache;
        return tensor;
    }
    void set_mask(const Tensor& mask) {
        if (!mask) return;
        const int64_t positions = x.sizes[1] ? x.values() / x.sizes[1] : 0;
        expect(mask.dtype == boolean && mask.is_contiguous(), "the mask must be bool, without gaps");
        expect(!positions || mask.values() == positions, "the mask must be (N, 1, *S)");
        task.mask = mask.data<uint8_t>();
    }
    void set_weights(const Tensor& weights) {
        if (!weights) return;
        const int64_t positions = x.sizes[1] ? x.values() / x.sizes[1] : 0;
        expect(weights.dtype == dtypes[(int)Dtype::float64] && weights.is_contiguous(), "sample weights must be float64, without gaps");
        expect(!positions || weights.values() == positions, "sample weights must be (N, 1, *S)");
        expect(!task.mask, "sample weights come without a mask: below 0 they mask");
        task.weights = weights.data<double>();
    }
    void set_activation(Arguments& arguments) {
        const int64_t code = arguments.integer();
        expect(code >= 0 && code < activations, "there is no such activation");
        task.activation = (Activation)code;
        task.slope = arguments.number();
    }
    // Groups of `size` samples; the last one has the samples that are left.
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
        if (const std::optional<Dtype> dtype = floating_dtype(x.dtype)) return *dtype;
        throw std::runtime_error("batchnorm: the CPU kernels take float32, float64, bfloat16 and float16");
    }

    void set_layout() {
        const Layout layout(x);
        if (!layout.planar && !layout.interleaved)
            throw std::runtime_error("batchnorm: the CPU kernels take x as (N, C, *S) or as (N, *S, C) in memory, without gaps");
        task.interleaved = task.C > 1 && (!layout.planar || task.S == 1);
        if (task.C == 1) task.S *= task.N, task.N = 1;
    }
};

// EPILOGUE_ARGUMENTS, which all verbs but `moments` take.
struct Epilogue {
    Tensor weight, bias, residual, mask;
    ChannelOperand weights, biases;

    Epilogue(Arguments& arguments, int64_t C, Call& call)
        : weight(arguments.optional_tensor()),
          bias(arguments.optional_tensor()),
          residual(arguments.optional_tensor()),
          mask(arguments.optional_tensor()),
          weights(weight, C),
          biases(bias, C) {
        call.task.weight = weights;
        call.task.bias = biases;
        call.task.residual = call.in_layout_of_x(residual);
        call.set_mask(mask);
        call.set_activation(arguments);
    }
};

inline bool is_float32_or_float64(const Tensor& tensor) {
    return tensor.dtype == dtypes[(int)Dtype::float32] || tensor.dtype == dtypes[(int)Dtype::float64];
}

// Whether both are (C,) and of one dtype, float32 or float64.
inline bool are_vectors(const Tensor& one, const Tensor& other, int64_t C) {
    const auto is_vector = [&](const Tensor& tensor) { return tensor.rank == 1 && tensor.sizes[0] == C; };
    return is_vector(one) && is_vector(other) && one.dtype == other.dtype && is_float32_or_float64(one);
}

// The values per channel: those of x, or those that the mask counts.
inline double count_of(const Tensor& x, const Tensor& masked_count) {
    if (masked_count) return ChannelValues::number(masked_count);
    return x.sizes[1] ? (double)(x.values() / x.sizes[1]) : 0.0;
}

inline Tensor channel_vector(const Tensor& x) {
    Tensor vector = Tensor::vector(x.sizes[1], dtypes[(int)Dtype::float64]);
    if (!x.values()) memset(vector.data<double>(), 0, x.sizes[1] * sizeof(double));
    return vector;
}

inline Tensor nothing(const Tensor& x) { return Tensor::vector(0, x.dtype); }

// One vector of C values for each group, (G, C).
inline Tensor group_vectors(const Tensor& x, int64_t groups) {
    const int64_t sizes[] = {groups, x.sizes[1]}, strides[] = {x.sizes[1], 1};
    Tensor vectors = Tensor::empty(2, sizes, strides, dtypes[(int)Dtype::float64]);
    if (!x.values()) memset(vectors.data<double>(), 0, vectors.values() * sizeof(double));
    return vectors;
}

// Makes running statistics the constants of a task, whose mean and rstd the kernels then write. They must outlive its run.
struct Constants {
    const ChannelOperand means, variances;

    Constants(Task& task, const Tensor& running_mean, const Tensor& running_var, double eps, int64_t C)
        : means(running_mean, C), variances(running_var, C) {
        task.running_mean = means, task.running_var = variances, task.eps = eps;
    }
};

}  // namespace
