// Shares tasks among threads: OpenMP's, which torch shares if it was built for the same OpenMP library, or the standard library's if the
// compiler has no OpenMP (Apple's clang).
#include "threads.h"

#include <atomic>
#include <memory>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace batchnorm {
namespace {

// The tasks of one thread that nobody has taken, in a cache line of its own.
struct alignas(64) Range {
    std::atomic<int64_t> taken{0};
    int64_t first = 0, count = 0;
};

}  // namespace

void share(int threads, int64_t tasks, Order order, void (*body)(const void*, int64_t), const void* closure) {
    const bool backwards = order == Order::backwards;
    if (threads > tasks) threads = (int)tasks;
    if (threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(closure, backwards ? tasks - 1 - task : task);
        return;
    }
    const std::unique_ptr<Range[]> ranges(new Range[threads]);
    for (int64_t thread = 0; thread < threads; ++thread) {
        ranges[thread].first = thread * tasks / threads;
        ranges[thread].count = (thread + 1) * tasks / threads - ranges[thread].first;
    }
    const auto work = [&](int thread) {
        for (int next = 0; next < threads; ++next) {
            Range& range = ranges[(thread + next) % threads];
            for (int64_t task; (task = range.taken.fetch_add(1, std::memory_order_relaxed)) < range.count;)
                body(closure, range.first + (backwards ? range.count - 1 - task : task));
        }
    };
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
#else
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
    work(0);
    for (std::thread& other : others) other.join();
#endif
}

}  // namespace batchnorm
