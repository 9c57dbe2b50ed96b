// Picks, once, the build of kernels.cpp for this processor, and for each call how many threads it is worth and whether its output
// should go around the cache.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"
#include "counted.h"

namespace batchnorm {

void run_baseline(Task& task);
#if defined(__x86_64__)
void run_x86_64_v3(Task& task);
void run_x86_64_v4(Task& task);
void run_x86_64_v4_bf16(Task& task);
#endif

namespace {

struct Build {
    const char* name;
    void (*run)(Task&);
};

// BATCHNORM_INSTRUCTION_SET names a slower one than the processor has, for tests.
bool wanted(const char* name) {
    const char* asked = getenv("BATCHNORM_INSTRUCTION_SET");
    return !asked || !strcmp(asked, name);
}

Build fastest_build() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (v4 && __builtin_cpu_supports("avx512bf16") && wanted("AVX-512 BF16")) return {"AVX-512 BF16", run_x86_64_v4_bf16};
    if (v4 && wanted("AVX-512")) return {"AVX-512", run_x86_64_v4};
    if (v3 && wanted("AVX2")) return {"AVX2", run_x86_64_v3};
#endif
    return {"baseline", run_baseline};
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
    build.run(task);
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
#pragma omp parallel for schedule(dynamic, 1) num_threads(task.threads) if (apart)
    for (int64_t number = 0; number < task.groups; ++number) {
        Task group = group_of(task, number);
        if (apart) group.threads = 1;
        run_group(group);
    }
}

const char* instruction_set() { return build.name; }

}  // namespace batchnorm
