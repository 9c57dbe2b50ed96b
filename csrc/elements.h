// What happens to one vector of elements; planar.h and interleaved.h say in which order the vectors come.
#pragma once

#include "activation.h"
#include "channels.h"

namespace {

// What a reduction adds: Σ value and Σ left · right.
template <class Vector>
struct Term {
    Vector value, left, right;
};

enum class Residual { none, some, asked };  // known to the compiler, or asked about for each vector

// The tensors of one call, and the elementwise formulas over them. `i` is the place of an element in x, `m` in the mask.
template <class Storage, class Act, Residual with_residual, bool masked>
struct Elements {
    typedef Storage T;
    typedef Act Activation;
    static constexpr bool has_mask = masked;
    typedef typename T::Element Element;
    typedef typename T::Vector Vector;

    const Element *x, *dy, *residual;
    const uint8_t* mask;
    Act activation;

    Elements(const Task& task, Act activation)
        : x((const Element*)task.x),
          dy((const Element*)task.dy),
          residual((const Element*)task.residual),
          mask(task.mask),
          activation(activation) {}

    // A select, not a product: 0 · NaN is NaN, and padding may hold anything.
    template <class Part>
    INLINE Vector where_counted(Vector values, int64_t m, Part part) const {
        if constexpr (!has_mask) return values;
        typename T::Mask counted = {};
        for (int lane = 0; lane < lanes(part); ++lane) counted[lane] = mask[m + lane] ? -1 : 0;
        return counted ? values : Vector{};
    }

    template <class Part>
    INLINE Vector deviation(int64_t i, const Channel<Vector>& channel, Part part) const {
        return T::load(x + i, part) - channel.mean;
    }

    template <class Part>
    INLINE Vector pre_activation(int64_t i, Vector d, const Channel<Vector>& channel, Part part) const {
        Vector z = d * channel.scale + channel.offset;
        if (with_residual == Residual::some || (with_residual == Residual::asked && residual)) z += T::load(residual + i, part);
        return z;
    }

    template <class Part>
    INLINE Vector grad(int64_t i, Vector d, const Channel<Vector>& channel, Part part) const {
        const Vector dy_here = T::load(dy + i, part);
        if constexpr (!Act::needs_z) return dy_here;
        return activation.grad(dy_here, pre_activation(i, d, channel, part));
    }

  private:
    static INLINE int lanes(Whole) { return T::width; }
    static INLINE int lanes(Some some) { return some.count; }
};

// Σ(x-K) and Σ(x-K)²
template <class E>
struct MomentTerm {
    const E& elements;

    template <class Part>
    INLINE Term<typename E::Vector> operator()(
        int64_t i, int64_t m, const Channel<typename E::Vector>& channel, Part part) const {
        const auto d = keep(elements.where_counted(elements.deviation(i, channel, part), m, part), part);
        return {d, d, d};
    }
};

// Σg and Σg·d
template <class E>
struct GradTerm {
    const E& elements;

    template <class Part>
    INLINE Term<typename E::Vector> operator()(
        int64_t i, int64_t m, const Channel<typename E::Vector>& channel, Part part) const {
        const auto d = elements.where_counted(elements.deviation(i, channel, part), m, part);
        const auto g = elements.where_counted(elements.grad(i, d, channel, part), m, part);
        return {keep(g, part), keep(g, part), keep(d, part)};
    }
};

// A map writes one tensor, or two where it gives dresidual as well.
template <class Vector>
struct Written {
    Vector first, second;
};

template <class E>
struct NormalizeMap {
    const E& elements;

    template <class Part>
    INLINE Written<typename E::Vector> operator()(
        int64_t i, int64_t m, const Channel<typename E::Vector>& channel, Part part) const {
        const auto z = elements.pre_activation(i, elements.deviation(i, channel, part), channel, part);
        const auto y = elements.where_counted(elements.activation.value(z), m, part);
        return {y, y};
    }
};

template <class E>
struct InputGradMap {
    const E& elements;

    template <class Part>
    INLINE Written<typename E::Vector> operator()(
        int64_t i, int64_t m, const Channel<typename E::Vector>& channel, Part part) const {
        const auto d = elements.deviation(i, channel, part);
        const auto g = elements.where_counted(elements.grad(i, d, channel, part), m, part);
        const auto dx = (g + (d * channel.slope + channel.level)) * channel.grad_scale;
        return {elements.where_counted(dx, m, part), g};
    }
};

// Where a map writes: `second` is null but for dresidual, `first` where only that is wanted.
template <class T>
struct Outputs {
    typename T::Element *first, *second;

    template <class Part>
    INLINE void store(int64_t i, const Written<typename T::Vector>& values, Part part) const {
        if (first) T::store(first + i, values.first, part);
        if (second) T::store(second + i, values.second, part);
    }
    INLINE void stream(int64_t i, const Written<typename T::Vector>& values) const {
        if (first) T::stream(first + i, values.first);
        if (second) T::stream(second + i, values.second);
    }
    INLINE Outputs moved(int64_t by) const { return {first ? first + by : nullptr, second ? second + by : nullptr}; }

    // Elements before the first whose vector is aligned; -1 if the two tensors disagree.
    INLINE int64_t to_alignment() const {
        constexpr uint64_t size = sizeof(typename T::Element), vector = size * T::width;
        const uint64_t address = (uint64_t)(first ? first : second);
        if (first && second && ((uint64_t)first ^ (uint64_t)second) % vector) return -1;
        return address % size ? -1 : (int64_t)((vector - address % vector) % vector / size);
    }
};

// Runs body(0 ... tasks - 1) on up to `threads` threads; the caller alone where one will do, without waking OpenMP.
template <class Body>
void parallel(int threads, int64_t tasks, const Body& body) {
    if (threads <= 1 || tasks <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(task);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)(threads < tasks ? threads : tasks))
    for (int64_t task = 0; task < tasks; ++task) body(task);
}

INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
INLINE int64_t at_least(int64_t value, int64_t limit) { return value > limit ? value : limit; }
INLINE int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// A float32 sum that overflowed, or whose squares fell below what float32 resolves, is taken again in float64.
INLINE bool needs_float64(double value, double product, double count) {
    return !isfinite(value) || !isfinite(product) || (value != 0.0 && fabs(product) < underflow_per_value * count);
}

}  // namespace
