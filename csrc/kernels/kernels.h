// Runs the verbs of kernels/contract.py on both layouts; those with sample weights are in weighted.h. kernels_float.cpp and
// kernels_half.cpp call it for their storage types; each of them is compiled once for every instruction set, with BATCHNORM_ISA as the
// namespace of its entry.
#pragma once

#include "kernels/interleaved.h"
#include "kernels/planar.h"
#include "kernels/weighted.h"

namespace {

template <class Layout, class Loops>
NOINLINE void run_loops(Task& task, const Loops& loops) {
    Layout layout(task, loops);
    switch (task.verb) {
        case Verb::moments:
        case Verb::reduce_grad: return layout.reduce();
        case Verb::normalize:
        case Verb::input_grad: return layout.map();
        case Verb::forward:
        case Verb::backward: return layout.fused();
    }
}

// Moments do not depend on the epilogue: all activations share their loops.
template <class E>
using Plain = Elements<typename E::T, Known<Activation::identity>, Residual::none, E::has_mask>;

template <class E>
void run_unmasked(Task& task) {
    typedef typename E::T T;
    ColumnLoops<T> columns;
    typename Planar<T>::Loops planar = {};
    if (goes_forward(task)) {
        typedef MomentTerm<Plain<E>, false> Term;
        typedef MomentTerm<Plain<E>, true> Again;
        columns = {sum_columns<T, Term>, sum_columns<T, Again>, map_columns<T, NormalizeMap<E>>};
        planar = {columns, &Planar<T>::template sum_rows<Term>, &Planar<T>::template sum_rows<Again>,
                  &Planar<T>::template map_rows<NormalizeMap<E>>, nullptr};
    } else {
        columns = {sum_columns<T, GradTerm<E>>, sum_columns<T, GradTerm<E>>, map_columns<T, InputGradMap<E>>};
        planar = {columns, &Planar<T>::template sum_rows<GradTerm<E>>, &Planar<T>::template sum_rows<GradTerm<E>>,
                  &Planar<T>::template map_rows<InputGradMap<E>>, nullptr};
    }
    task.interleaved ? run_loops<Interleaved<T>>(task, columns) : run_loops<Planar<T>>(task, planar);
}

template <class E>
void run_masked_planar(Task& task) {
    typedef Planar<typename E::T> Layout;
    if (goes_forward(task)) {
        run_loops<Layout, typename Layout::Loops>(task, {{},
                                                         &Layout::template sum_counted<MomentTerm<Plain<E>, false>>,
                                                         &Layout::template sum_counted<MomentTerm<Plain<E>, true>>,
                                                         &Layout::template map_rows<NormalizeMap<E>>,
                                                         &Layout::template map_joined<NormalizeMap<E>>});
    } else {
        run_loops<Layout, typename Layout::Loops>(task, {{},
                                                         &Layout::template sum_counted<GradTerm<E>>,
                                                         &Layout::template sum_counted<GradTerm<E>>,
                                                         &Layout::template map_rows<InputGradMap<E>>,
                                                         &Layout::template map_joined<InputGradMap<E>>});
    }
}

// The frequent epilogues have loops of their own in float32 and bfloat16: none, relu, and without a planar mask residual and relu. All
// other calls share general loops, which choose the activation once for four vectors in float32 and bfloat16, else for each: float64,
// float16, residuals under planar masks, and planar masks in bfloat16. In the interleaved layout a mask leaves out whole rows, so it needs
// no loops of its own.
template <class T>
void run_storage(Task& task) {
    typedef AnyActivation<typename T::Vector, T::is_common ? activated_together : 1> Any;
    typedef AnyActivation<typename T::Vector, 1> AnyUnderMask;
    typedef Known<Activation::identity> Identity;
    typedef Known<Activation::relu> Relu;
    const bool identity = task.activation == Activation::identity && !task.residual, relu = task.activation == Activation::relu;
    if (task.mask && !task.interleaved) {
        if constexpr (T::is_common && sizeof(typename T::Element) == sizeof(float)) {
            if (identity) return run_masked_planar<Elements<T, Identity, Residual::none, true>>(task);
            if (relu && !task.residual) return run_masked_planar<Elements<T, Relu, Residual::none, true>>(task);
        }
        return run_masked_planar<Elements<T, AnyUnderMask, Residual::optional, true>>(task);
    }
    if constexpr (T::is_common) {
        if (identity) return run_unmasked<Elements<T, Identity, Residual::none, false>>(task);
        if (relu)
            return task.residual ? run_unmasked<Elements<T, Relu, Residual::given, false>>(task)
                                 : run_unmasked<Elements<T, Relu, Residual::none, false>>(task);
    }
    run_unmasked<Elements<T, Any, Residual::optional, false>>(task);
}

}  // namespace
