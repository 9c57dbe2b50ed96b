// Runs tasks on several threads.
#pragma once

#include <stdint.h>

namespace batchnorm {

enum class Order { forwards, backwards };

// Runs body(closure, task) for the tasks 0 ... tasks - 1, see `parallel`.
void share(int threads, int64_t tasks, Order order, void (*body)(const void*, int64_t), const void* closure);

namespace {  // each build has its own copy, see simd/types.h

// Whether `threads` threads that share `tasks` equal tasks are idle for at most half the time that they work.
inline bool is_balanced(int64_t threads, int64_t tasks) {
    const int64_t rounds = (tasks + threads - 1) / threads;
    return rounds * threads * 2 <= tasks * 3;
}

// Runs body(0 ... tasks - 1) on up to `threads` threads. If one is enough, the caller runs them and wakes no thread.
//
// Each thread has a range of its own, which it runs in the given order, and then helps the others. Torch's operators share tensors by such
// ranges too, so a thread finds in its cache what it wrote there.
template <class Body>
void parallel(int threads, int64_t tasks, const Body& body, Order order = Order::forwards) {
    share(threads, tasks, order, [](const void* closure, int64_t task) { (*(const Body*)closure)(task); }, &body);
}

}  // namespace
}  // namespace batchnorm
