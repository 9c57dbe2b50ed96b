// Chooses the build of the kernels for this processor, once, and the number of threads for each call.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "kernels/counted.h"
#include "threads.h"

namespace batchnorm {

// The functions of one instruction set's build; null where the library was linked without it.
#if defined(__x86_64__)
#define MAYBE __attribute__((weak))
#else
#define MAYBE
#endif
#define DECLARE_BUILD(isa)            \
    namespace isa {                   \
    MAYBE void run_float(Task& task); \
    MAYBE void run_half(Task& task);  \
    }
DECLARE_BUILD(baseline)
#if defined(__x86_64__)
DECLARE_BUILD(x86_64_v3)
DECLARE_BUILD(x86_64_v4)
DECLARE_BUILD(x86_64_v4_bf16)
#endif

namespace {

struct Build {
    const char* name;
    void (*run_float)(Task&);
    void (*run_half)(Task&);
    bool supported;  // by this processor

    bool exists() const { return run_float && run_half; }
    bool usable() const { return exists() && supported; }
};

// Tests set BATCHNORM_INSTRUCTION_SET to choose a slower build than the fastest.
bool wanted(const char* name) {
    const char* asked = getenv("BATCHNORM_INSTRUCTION_SET");
    return !asked || !strcmp(asked, name);
}

// The fastest first. The last one runs anywhere.
struct Builds {
    static constexpr int most = 4;
    Build all[most];
    int count;

    const Build* begin() const { return all; }
    const Build* end() const { return all + count; }
};

Builds known_builds() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const bool bf16 = v4 && __builtin_cpu_supports("avx512bf16");
    return {{{"AVX-512 BF16", x86_64_v4::run_float, x86_64_v4_bf16::run_half, bf16},
             {"AVX-512", x86_64_v4::run_float, x86_64_v4::run_half, v4},
             {"AVX2", x86_64_v3::run_float, x86_64_v3::run_half, v3},
             {"baseline", baseline::run_float, baseline::run_half, true}},
            4};
#else
    return {{{"baseline", baseline::run_float, baseline::run_half, true}}, 1};
#endif
}

const Builds builds = known_builds();

Build fastest_build() {
    for (const Build& build : builds)
        if (build.usable() && wanted(build.name)) return build;
    for (const Build& build : builds)  // the wanted build does not run here
        if (build.usable()) return build;
    return {};
}

const Build build = fastest_build();

// A forked child does not have the OpenMP threads of its parent, and would wait for them forever.
bool forked = false;
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Waking a thread costs about 5 us, in which one core moves 64 KB.
constexpr int64_t values_worth_a_thread = 1 << 15;

void run_group(Task& task) {
    task.counted = task.mask ? counted(task.mask, task.N * task.S) : task.N * task.S;
    const int64_t worth = task.N * task.C * task.S / values_worth_a_thread;
    if (worth < 2) task.threads = 1;
    if (task.threads > worth) task.threads = worth < 1 ? 1 : (int)worth;
    const bool is_half = task.dtype == Dtype::bfloat16 || task.dtype == Dtype::float16;
    (is_half ? build.run_half : build.run_float)(task);
}

template <class Pointer>
void advance(Pointer& pointer, int64_t bytes) {
    if (pointer) pointer = (Pointer)((char*)pointer + bytes);
}

// Samples are the outermost axis of both layouts, so a group is a contiguous slice of every tensor.
Task group_of(const Task& task, int64_t number) {
    Task group = task;
    const int64_t first = number * task.group_size;
    const int64_t values = first * task.C * task.S * element_size(task.dtype), channels = number * task.C * (int64_t)sizeof(double);
    group.groups = 0;
    group.N = number + 1 < task.groups ? task.group_size : task.N - first;
    advance(group.x, values), advance(group.dy, values), advance(group.residual, values);
    advance(group.output, values), advance(group.dresidual, values), advance(group.mask, first * task.S);
    advance(group.weights, first * task.S * (int64_t)sizeof(double));
    advance(group.mean, channels), advance(group.m2, channels), advance(group.rstd, channels);
    advance(group.sum_grad, channels), advance(group.sum_grad_xhat, channels);
    advance(group.mean_grad, channels), advance(group.mean_grad_xhat, channels);
    const int64_t positions = group.N * group.S, count = group.mask ? counted(group.mask, positions) : positions;
    if (task.counts) task.counts[number] = (double)count;
    group.count = count > 1 ? (double)count : 1.0;
    return group;
}

}  // namespace

void run(Task& task) {
    if (forked) task.threads = 1;
    if (task.groups <= 1) return run_group(task);
    // Either one thread for each group, or all threads for one group after another.
    const bool group_per_thread =
        task.threads > 1 && is_balanced(task.threads, task.groups) && task.N * task.C * task.S >= 2 * values_worth_a_thread;
    parallel(group_per_thread ? task.threads : 1, task.groups, [&](int64_t number) {
        Task group = group_of(task, number);
        if (group_per_thread) group.threads = 1;
        run_group(group);
    });
}

const char* instruction_set() { return build.usable() ? build.name : nullptr; }

const char* build_name(int number) {
    for (const Build& build : builds)
        if (build.exists() && number-- == 0) return build.name;
    return nullptr;
}

}  // namespace batchnorm
