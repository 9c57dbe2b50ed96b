// The computation on one vector of elements; planar.h and interleaved.h loop over the vectors.
#pragma once

#include "kernels/activation.h"
#include "kernels/channels.h"
#include "kernels/counted.h"
#include "threads.h"

namespace {

using batchnorm::is_balanced;
using batchnorm::parallel;

constexpr int64_t chunk_values = 1 << 16;  // of a channel, or of rows of channels, in a sum that one thread computes
constexpr int64_t most_chunks = 64;        // of rows of channels

// How many vectors of elements lie in one cache line.
template <class T>
constexpr int64_t vectors_of_line = at_least(cache_line / (T::width * (int64_t)sizeof(typename T::Element)), 1);

enum class Residual { none, given, optional };  // known at compile time, or checked for each vector

// Copies of x, dy and the residual, in this order; each begins `stride` elements after the one before.
template <class T>
struct Copies {
    typename T::Element* first = nullptr;
    int64_t stride = 0;
};

// The tensors of one call, and the elementwise formulas over them. `i` is the index of an element in x, `m` its index in the mask.
template <class Storage, class Act, Residual with_residual, bool masked>
struct Elements {
    typedef Storage T;
    typedef Act Activation;
    static constexpr bool has_mask = masked, has_residual = with_residual != Residual::none;
    typedef typename T::Element Element;
    typedef typename T::Vector Vector;
    typedef Elements<Storage, Act, with_residual, false> Unmasked;

    const Element *x, *dy, *residual;
    const uint8_t *mask, *mask_end;
    Act activation;

    explicit Elements(const Task& task)
        : x((const Element*)task.x),
          dy((const Element*)task.dy),
          residual((const Element*)task.residual),
          mask(task.mask),
          mask_end(task.mask + task.N * task.S),
          activation(task) {}
    Elements(const Element* x, const Element* dy, const Element* residual, Act activation)
        : x(x), dy(dy), residual(residual), mask(nullptr), mask_end(nullptr), activation(activation) {}

    // The same elements under another mask.
    Elements under(const uint8_t* other, const uint8_t* other_end) const {
        Elements elements = *this;
        elements.mask = other, elements.mask_end = other_end;
        return elements;
    }
    // The same elements without a mask.
    Unmasked unmasked() const { return {x, dy, residual, activation}; }
    // The same without a mask, read from the copies if there are any.
    Unmasked over(const Copies<T>& copies) const {
        if (!copies.first) return unmasked();
        return {copies.first, copies.first + copies.stride, residual ? copies.first + 2 * copies.stride : nullptr, activation};
    }

    // Prefetches the lines of `count` vectors of each tensor from `i` on.
    template <bool of_x_alone>
    INLINE void prefetch_vectors(int64_t i, int count) const {
        UNROLLED
        for (int vector = 0; vector < count; vector += vectors_of_line<T>) {
            const int64_t at = i + vector * T::width;
            prefetch(x + at);
            if constexpr (!of_x_alone) prefetch(dy + at);
            if constexpr (!of_x_alone && has_residual) prefetch(residual + at);
        }
    }

    // `values` where the mask counts an element, else `others`. Selected, not multiplied by 0: padding may hold NaN.
    template <class Lanes>
    INLINE Vector counted(Vector values, Vector others, int64_t m, Lanes lanes) const {
        if constexpr (!has_mask) return values;
        if constexpr (!Lanes::is_whole) {  // byte by byte at the end of the mask alone
            if (mask + m + T::width > mask_end) return lanes_of<T>(mask + m, lanes) ? values : others;
        }
        return lanes_of<T>(mask + m, Whole{}) ? values : others;
    }

    template <class Lanes>
    INLINE Vector deviation(int64_t i, const Channel<Vector>& channel, Lanes lanes) const {
        return T::load(x + i, lanes) - channel.mean;
    }

    template <class Lanes>
    INLINE Vector pre_activation(int64_t i, Vector d, const Channel<Vector>& channel, Lanes lanes) const {
        Vector offset = channel.offset;
        if constexpr (T::rounds_scale) {
            const Vector finite = Simd::bounded(d, 0x1.fffffep127f);  // infinity · 0 is NaN
            offset = Simd::multiply_add(finite, channel.scale_rest, offset);
        }
        Vector z = Simd::multiply_add(d, channel.scale, offset);
        if (with_residual == Residual::given || (with_residual == Residual::optional && residual)) z += T::load(residual + i, lanes);
        return z;
    }

    template <int count, class Lanes>
    INLINE Several<Vector, count> values(Places<count> i, const Channel<Vector>& channel, Lanes lanes) const {
        Several<Vector, count> z;
        UNROLLED
        for (int number = 0; number < count; ++number)
            z.at[number] = pre_activation(i.at[number], deviation(i.at[number], channel, lanes), channel, lanes);
        return activation.values(z);
    }

    template <int count, class Lanes>
    INLINE Several<Vector, count> grads(Places<count> i, Several<Vector, count> d, const Channel<Vector>& channel, Lanes lanes) const {
        Several<Vector, count> dy_here, z;
        UNROLLED
        for (int number = 0; number < count; ++number) dy_here.at[number] = T::load(dy + i.at[number], lanes);
        if constexpr (!Act::needs_z) return dy_here;
        UNROLLED
        for (int number = 0; number < count; ++number) z.at[number] = pre_activation(i.at[number], d.at[number], channel, lanes);
        return activation.grads(dy_here, z);
    }
};

// The terms of the reductions. Under a mask the loops pass only elements that count, so the terms ignore the mask.
// `again`: the second sums, about the mean that the first sums gave.
template <class E, bool again>
struct MomentTerm {
    typedef typename BlockOfMoments<typename E::T, again>::Type Block;
    static constexpr bool has_mask = E::has_mask;
    static constexpr int unrolled = vectors_of_block, together = 1;
    const typename E::Unmasked elements;

    static MomentTerm of(const Task& task, const Copies<typename E::T>& copies = {}) { return {E(task).over(copies)}; }
    INLINE void prefetch(int64_t i, int count) const { elements.template prefetch_vectors<true>(i, count); }

    template <class Lanes>
    INLINE auto operator()(Places<1> i, const Channel<typename E::Vector>& channel, Lanes lanes) const {
        typedef typename E::Vector Vector;
        const Vector x = E::T::load(elements.x + i.at[0], lanes);
        if constexpr (Sums<typename E::T>::about_zero && !again) {
            return Several<SquareTermValues<Vector>, 1>{{{x}}};
        } else {
            return Several<DeviationTermValues<Vector>, 1>{{{within(x, channel.mean, lanes)}}};
        }
    }
};

template <class E>
struct GradTerm {
    typedef EvenAndOdd<typename E::T> Block;
    static constexpr bool has_mask = E::has_mask;
    static constexpr int unrolled = E::Activation::unrolled, together = E::Activation::together;
    const typename E::Unmasked elements;

    static GradTerm of(const Task& task, const Copies<typename E::T>& copies = {}) { return {E(task).over(copies)}; }
    INLINE void prefetch(int64_t i, int count) const { elements.template prefetch_vectors<false>(i, count); }

    template <int count, class Lanes>
    INLINE auto operator()(Places<count> i, const Channel<typename E::Vector>& channel, Lanes lanes) const {
        typedef typename E::Vector Vector;
        Several<Vector, count> x, d;
        UNROLLED
        for (int number = 0; number < count; ++number) {
            x.at[number] = E::T::load(elements.x + i.at[number], lanes);
            d.at[number] = x.at[number] - channel.mean;
        }
        const Several<Vector, count> g = elements.grads(i, d, channel, lanes);
        Several<GradTermValues<Vector>, count> terms;
        UNROLLED
        for (int number = 0; number < count; ++number) {
            const Vector factor = Sums<typename E::T>::grads_about_zero ? x.at[number] : d.at[number];
            terms.at[number] = {within(g.at[number], Vector{}, lanes), factor};
        }
        return terms;
    }
};

// Adds the terms of one vector to a block.
template <class Term, class Vector, class Lanes>
INLINE void add_to(typename Term::Block& block, int64_t i, const Channel<Vector>& channel, const Term& term, int64_t number, Lanes lanes) {
    block.add(term(Places<1>{{i}}, channel, lanes).at[0], channel.mean, number);
}
// The same for a whole block, whose vectors begin `step` elements apart.
template <class Term, class Vector>
INLINE void add_all_to(typename Term::Block& block, int64_t i, int64_t step, const Channel<Vector>& channel, const Term& term) {
    for (int first = 0; first < vectors_of_block; first += Term::unrolled) {
        UNROLLED
        for (int number = first; number < first + Term::unrolled; number += Term::together) {
            const auto terms = term(consecutive<Term::together>(i, step), channel, Whole{});
            UNROLLED
            for (int added = 0; added < Term::together; ++added) block.add(terms.at[added], channel.mean, number + added);
            i += Term::together * step;
        }
    }
}

// How many vectors each iteration of a map's loop takes: the lines of one vector, or those that are activated together.
template <class E>
constexpr int unrolled_in_maps = (int)at_least(at_most(vectors_of_line<typename E::T>, E::Activation::unrolled), E::Activation::together);

// The results of a map for one vector: y, or dx and dresidual.
template <class Vector>
struct Written {
    Vector first, second;
};

template <class E>
struct NormalizeMap {
    static constexpr bool has_mask = E::has_mask, writes_two = false;
    static constexpr int together = E::Activation::together, unrolled = unrolled_in_maps<E>;
    static constexpr bool by_rows = vector_bytes == 32 && sizeof(typename E::T::Element) == sizeof(float) && together == 1;
    const E elements;

    static NormalizeMap of(const Task& task) { return {E(task)}; }
    NormalizeMap under(const uint8_t* mask, const uint8_t* end) const { return {elements.under(mask, end)}; }
    INLINE void prefetch(int64_t i, int count) const { elements.template prefetch_vectors<true>(i, count); }

    template <int count, class Lanes>
    INLINE auto operator()(Places<count> i, Places<count> m, const Channel<typename E::Vector>& channel, Lanes lanes) const {
        typedef typename E::Vector Vector;
        const Several<Vector, count> values = elements.values(i, channel, lanes);
        Several<Written<Vector>, count> written;
        UNROLLED
        for (int number = 0; number < count; ++number) {
            const Vector y = elements.counted(values.at[number], Vector{}, m.at[number], lanes);
            written.at[number] = {y, y};
        }
        return written;
    }
};

template <class E>
struct InputGradMap {
    static constexpr bool has_mask = E::has_mask, writes_two = E::has_residual, by_rows = false;
    static constexpr int together = E::Activation::together, unrolled = unrolled_in_maps<E>;
    const E elements;

    static InputGradMap of(const Task& task) { return {E(task)}; }
    InputGradMap under(const uint8_t* mask, const uint8_t* end) const { return {elements.under(mask, end)}; }
    INLINE void prefetch(int64_t i, int count) const { elements.template prefetch_vectors<false>(i, count); }

    template <int count, class Lanes>
    INLINE auto operator()(Places<count> i, Places<count> m, const Channel<typename E::Vector>& channel, Lanes lanes) const {
        typedef typename E::Vector Vector;
        Several<Vector, count> d;
        UNROLLED
        for (int number = 0; number < count; ++number) d.at[number] = elements.deviation(i.at[number], channel, lanes);
        const Several<Vector, count> grads = elements.grads(i, d, channel, lanes);
        Several<Written<Vector>, count> written;
        UNROLLED
        for (int number = 0; number < count; ++number) {
            const Vector g = elements.counted(grads.at[number], Vector{}, m.at[number], lanes);
            const Vector from_x = Simd::multiply_add(d.at[number] * channel.rstd, channel.slope, channel.level);
            const Vector dx = Simd::multiply_add(g, channel.grad_scale, from_x);
            written.at[number] = {elements.counted(dx, Vector{}, m.at[number], lanes), g};
        }
        return written;
    }
};

// The tensors that a map writes: `first` is y or dx. With `two`, `second` is dresidual, and either may be null.
template <class T, bool two>
struct Outputs {
    typename T::Element *first, *second;

    explicit Outputs(const Task& task) : first((typename T::Element*)task.output), second((typename T::Element*)task.dresidual) {}

    template <class Lanes>
    INLINE void store(int64_t i, const Written<typename T::Vector>& values, Lanes lanes) const {
        if (!two || first) T::store(first + i, values.first, lanes);
        if (two && second) T::store(second + i, values.second, lanes);
    }
    INLINE void stream(int64_t i, const Written<typename T::Vector>& values) const {
        if (!two || first) T::stream(first + i, values.first);
        if (two && second) T::stream(second + i, values.second);
    }
    void clear(int64_t from, int64_t to) const {
        if (first) memset(first + from, 0, (to - from) * sizeof(typename T::Element));
        if (second) memset(second + from, 0, (to - from) * sizeof(typename T::Element));
    }

    // Elements from `i` to the first whose vector is aligned; -1 if the two tensors disagree.
    INLINE int64_t to_alignment(int64_t i) const {
        constexpr uint64_t size = sizeof(typename T::Element), vector = size * T::width;
        const uint64_t address = (uint64_t)(first ? first : second) + i * size;
        if (first && second && ((uint64_t)first ^ (uint64_t)second) % vector) return -1;
        return address % size ? -1 : (int64_t)((vector - address % vector) % vector / size);
    }
};

// Maps a partial vector.
template <class Vector, class Map, class Out>
NOINLINE void map_partial(int64_t i, int64_t m, const Channel<Vector>& channel, Partial lanes, const Map& map, const Out& out) {
    out.store(i, map(Places<1>{{i}}, Places<1>{{m}}, channel, lanes).at[0], lanes);
}

// Maps whole vectors, around the cache with `stream`.
template <bool stream, int count, class Vector, class Map, class Out>
INLINE void map_whole(Places<count> i, Places<count> m, const Channel<Vector>& channel, const Map& map, const Out& out) {
    const auto written = map(i, m, channel, Whole{});
    UNROLLED
    for (int number = 0; number < count; ++number) {
        if constexpr (stream) {
            out.stream(i.at[number], written.at[number]);
        } else {
            out.store(i.at[number], written.at[number], Whole{});
        }
    }
}

constexpr int tensors_of_a_sum = 3;  // x, dy and the residual

// How many tensors of x's size both passes of a call read.
inline int tensors_of_both(const Task& task) { return task.dy ? task.residual ? 3 : 2 : 1; }

}  // namespace
