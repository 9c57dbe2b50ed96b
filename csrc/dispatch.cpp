// Picks, once, the build of the kernels for this processor, and for each call how many threads it is worth and whether its output
// should go around the cache.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "kernels/counted.h"
#include "threads.h"

namespace batchnorm {

// What one instruction set's build offers; null where the library was made without it.
#if defined(__x86_64__)
#define MAYBE __attribute__((weak))
#else
#define MAYBE
#endif
#define DECLARE_BUILD(isa)           \
    namespace isa {                  \
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

// BATCHNORM_INSTRUCTION_SET names a slower one than the processor has, for tests.
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
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
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
    for (const Build& build : builds)  // the one wanted is not to be had
        if (build.usable()) return build;
    return {};
}

const Build build = fastest_build();

// A child forked from a process that has used OpenMP's threads has none of them, and waits for them for ever.
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
void move(Pointer& pointer, int64_t bytes) {
    if (pointer) pointer = (Pointer)((char*)pointer + bytes);
}

// Samples are outermost in both layouts: a group is a piece of every tensor.
Task group_of(const Task& task, int64_t number) {
    Task group = task;
    const int64_t first = number * task.group_size, size = task.dtype == Dtype::float64 ? 8 : task.dtype == Dtype::float32 ? 4 : 2;
    const int64_t values = first * task.C * task.S * size, channels = number * task.C * (int64_t)sizeof(double);
    group.groups = 0;
    group.N = number + 1 < task.groups ? task.group_size : task.N - first;
    move(group.x, values), move(group.dy, values), move(group.residual, values);
    move(group.output, values), move(group.dresidual, values), move(group.mask, first * task.S);
    move(group.mean, channels), move(group.m2, channels), move(group.rstd, channels);
    move(group.sum_grad, channels), move(group.sum_grad_xhat, channels);
    move(group.mean_grad, channels), move(group.mean_grad_xhat, channels);
    const int64_t positions = group.N * group.S, count = group.mask ? counted(group.mask, positions) : positions;
    if (task.counts) task.counts[number] = (double)count;
    group.count = count > 1 ? (double)count : 1.0;
    return group;
}

}  // namespace

void run(Task& task) {
    if (forked) task.threads = 1;
    if (task.groups <= 1) return run_group(task);
    const int64_t rounds = (task.groups + task.threads - 1) / task.threads;
    // A thread for each group, unless they would wait for one another more than half as long as they work.
    const bool apart = task.threads > 1 && rounds * task.threads * 2 <= task.groups * 3 &&
                       task.N * task.C * task.S >= 2 * values_worth_a_thread;
    parallel(apart ? task.threads : 1, task.groups, [&](int64_t number) {
        Task group = group_of(task, number);
        if (apart) group.threads = 1;
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
