// The interface between the layers of the library: torch/ (torch's tensors) fills a Task, dispatch.cpp picks the build for this
// processor, kernels/ (built once for each instruction set) runs it.
#pragma once

#include <stdint.h>

namespace batchnorm {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };

// In bytes.
static constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// The activations by their names in kernels/activation.py; Python reads their numbers from the library. kernels/activation.h has the
// formula of each; without it, a row here does not compile.
#define ACTIVATIONS(ROW) ROW(identity) ROW(relu) ROW(relu6) ROW(leaky_relu) ROW(silu) ROW(hardswish) ROW(gelu) ROW(gelu_tanh)

#define ENUMERATOR(name) name,
enum class Activation : int32_t { ACTIVATIONS(ENUMERATOR) };
#undef ENUMERATOR

#define PLUS_ONE(name) +1
constexpr int activations = ACTIVATIONS(PLUS_ONE);
#undef PLUS_ONE

enum class Verb : int32_t { moments, normalize, reduce_grad, input_grad, forward, backward };

// Values of the channels, (C,), which are float64, or float32 where a tensor of torch is used as it is; or none.
struct ChannelVector {
    const void* values = nullptr;
    bool is_float32 = false;

    ChannelVector() = default;
    ChannelVector(const double* values) : values(values) {}
    ChannelVector(const float* values) : values(values), is_float32(true) {}
    explicit operator bool() const { return values; }
};

// One call of one verb; names and formulas are those of kernels/contract.py.
struct Task {
    Verb verb;
    Dtype dtype;       // of x, dy, residual, y, dx and dresidual
    bool interleaved;  // x is (N, S, C) in memory; otherwise (N, C, S)
    int64_t N, C, S;

    const void* x;
    const void* dy;
    const void* residual;     // x's layout, or null
    bool residual_is_output;  // in backward: `residual` holds y, from which the derivative is computed
    const uint8_t* mask;      // (N, S), or null
    const double* weights;    // of the samples, in moments and input_grad; (N, S), or null; see kernels/weighted.h
    int64_t counted;          // how many of the N · S positions the mask counts; set by `run`
    void* output;             // y or dx; null if dx is not needed
    void* dresidual;          // or null

    ChannelVector weight;          // none for 1
    ChannelVector bias;            // none for 0
    double* mean;                  // (C,), written by moments and forward, read by the others; see `running_mean`
    double* m2;                    // (C,), written by moments and forward
    double* rstd;                  // (C,), written by forward, read by the others
    double* sum_grad;              // (C,), written by reduce_grad and backward
    double* sum_grad_xhat;         // (C,), likewise
    const double* mean_grad;       // (C,), read by input_grad; null where the statistics are constants
    const double* mean_grad_xhat;  // (C,), likewise

    // Groups of `group_size` samples, each normalized with its own statistics; the last group has the remaining samples. With more
    // than one group, mean and the vectors after it are (groups, C).
    int64_t groups, group_size;
    double* counts;  // (groups,), written: the values per channel that each group counts, instead of `count`

    // In normalize, if there are any, mean and rstd are computed from these, and written.
    ChannelVector running_mean, running_var;

    // Batch renormalization, in forward if r is not null: x̂ · r + d replaces x̂, see kernels/channels.h. It reads the running statistics.
    double r_max, d_max;
    double* r;  // (C,), written, likewise the next
    double* d;

    double count;  // values per channel that the mask counts, or the sum of the weights; 0 in backward: the statistics are constants
    double eps;
    Activation activation;
    double slope;  // of leaky_relu

    int threads;
    bool from_memory;  // the tensors do not fit the cache
};

// Runs a task on the fastest build for this processor, with at most `task.threads` threads.
void run(Task& task);

// The name of that build; null if the library has none for this processor.
const char* instruction_set();
// The name of build `number` of this library, the fastest first, whether this processor runs it or not; null after the last.
const char* build_name(int number);

}  // namespace batchnorm
