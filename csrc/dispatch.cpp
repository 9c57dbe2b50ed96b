// Picks, once, the build of kernels.cpp for this processor, and for each call how many threads it is worth and whether its output
// should go around the cache.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"

namespace batchnorm {

void run_baseline(Task& task);
#if defined(__x86_64__)
void run_x86_64_v3(Task& task);
void run_x86_64_v4(Task& task);
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
    if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && wanted("AVX-512"))
        return {"AVX-512", run_x86_64_v4};
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

}  // namespace

void run(Task& task) {
    const int64_t worth = task.N * task.C * task.S / values_worth_a_thread;
    if (forked || worth < 2) task.threads = 1;
    if (task.threads > worth) task.threads = worth < 1 ? 1 : (int)worth;
    build.run(task);
}

const char* instruction_set() { return build.name; }

}  // namespace batchnorm
