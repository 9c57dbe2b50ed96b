// Whether the forward that runs now is a recomputation, as functional/recompute.py defines it: an operator that compiled code calls at each
// call.
#pragma once

#include "torch/tensors.h"

namespace {

// The id of the graph that autograd executes on this thread, or -1. It is not part of the stable interface; in a torch without it the
// operator is Python's.
int (*current_graph_task)();

thread_local int said = -1;  // what `bn.recomputation` says on this thread, or -1

void recomputing(StableIValue* stack, uint64_t count, uint64_t) {
    const Tensor like = Arguments(stack, count, "Tensor like").tensor();
    Tensor answer = Tensor::empty(0, nullptr, nullptr, boolean);
    *answer.data<bool>() = said < 0 ? current_graph_task() != -1 : said;
    stack[0] = answer.release();
}

}  // namespace
