// The verbs of kernels/contract.py over both layouts. Built once per instruction set, with BATCHNORM_ISA as its entry's name.
#include "interleaved.h"
#include "planar.h"

namespace {

using batchnorm::Dtype;

template <class Layout, class E>
void run_verb(Task& task, typename E::Activation activation) {
    // Moments know nothing of what follows: all activations share their loops.
    typedef Elements<typename E::T, Identity, Residual::none, E::has_mask> Plain;
    const E elements(task, activation);
    const Plain plain(task, {});
    // What both passes read.
    const int tensors = task.dy ? task.residual ? 3 : 2 : 1;
    Layout layout(task);
    switch (task.verb) {
        case Verb::moments: return layout.reduce(MomentTerm<Plain>{plain.unmasked()}, tensors);
        case Verb::normalize: return layout.map(NormalizeMap<E>{elements});
        case Verb::reduce_grad: return layout.reduce(GradTerm<E>{elements.unmasked()}, tensors);
        case Verb::input_grad: return layout.map(InputGradMap<E>{elements});
        case Verb::forward: return layout.fused(MomentTerm<Plain>{plain.unmasked()}, NormalizeMap<E>{elements}, tensors);
        case Verb::backward: return layout.fused(GradTerm<E>{elements.unmasked()}, InputGradMap<E>{elements}, tensors);
    }
}

// In the interleaved layout a mask leaves out rows, not lanes.
template <class T, class Act, Residual residual>
void run_layout(Task& task, Act activation) {
    if (task.interleaved) return run_verb<Interleaved<T>, Elements<T, Act, residual, false>>(task, activation);
    if (task.mask) return run_verb<Planar<T>, Elements<T, Act, residual, true>>(task, activation);
    run_verb<Planar<T>, Elements<T, Act, residual, false>>(task, activation);
}

// What is common has loops of its own; the other activations and float64 share the general ones.
template <class T>
void run_storage(Task& task) {
    if constexpr (sizeof(typename T::Real) == sizeof(float)) {
        if (task.activation == Activation::identity && !task.residual)
            return run_layout<T, Identity, Residual::none>(task, {});
        if (task.activation == Activation::relu)
            return task.residual ? run_layout<T, Relu, Residual::some>(task, {})
                                 : run_layout<T, Relu, Residual::none>(task, {});
    }
    run_layout<T, AnyActivation<T>, Residual::asked>(task, {task.activation, (typename T::Real)task.slope});
}

}  // namespace

namespace batchnorm {

#if defined(BATCHNORM_EXTENDS)  // converts to bfloat16 in one instruction; all else is as in the build it extends

void BATCHNORM_EXTENDS(Task& task);
void BATCHNORM_ISA(Task& task) {
    task.dtype == Dtype::bfloat16 ? run_storage<BFloat16>(task) : BATCHNORM_EXTENDS(task);
}

#else

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr int64_t exact_values = 4096;  // one microsecond of float64 arithmetic
#else
constexpr int64_t exact_values = INT64_MAX;
#endif

void BATCHNORM_ISA(Task& task) {
    switch (task.dtype) {
        case Dtype::float32:
            return task.counted * task.C <= exact_values ? run_storage<ExactFloat32>(task) : run_storage<Float32>(task);
        case Dtype::float64: return run_storage<Float64>(task);
        case Dtype::bfloat16: return run_storage<BFloat16>(task);
        case Dtype::float16: return run_storage<Float16>(task);
    }
}

#endif

}  // namespace batchnorm
