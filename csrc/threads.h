// Runs tasks on several threads: OpenMP's, which torch shares if it was built for the same OpenMP library, or the standard library's if the
// compiler has no OpenMP (Apple's clang).
#pragma once

#include <stdint.h>

#if !defined(_OPENMP)
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace batchnorm {
namespace {  // each build has its own copy, see simd/types.h

// Whether `threads` threads that share `tasks` equal tasks are idle for at most half the time that they work.
inline bool is_balanced(int64_t threads, int64_t tasks) {
    const int64_t rounds = (tasks + threads - 1) / threads;
    return rounds * threads * 2 <= tasks * 3;
}

// Runs body(0 ... tasks - 1) on up to `threads` threads. If one is enough, the caller runs them and wakes no thread.
template <class Body>
void parallel(int threads, int64_t tasks, const Body& body) {
    if (threads > tasks) threads = (int)tasks;
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(task);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) body(task);
#else
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t task = next++; task < tasks; task = next++) body(task);
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
#endif
}

}  // namespace
}  // namespace batchnorm
