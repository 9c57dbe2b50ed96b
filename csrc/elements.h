// What happens to one vector of elements; planar.h and interleaved.h say in which order the vectors come.
#pragma once

#include "activation.h"
#include "channels.h"

namespace {

// What a reduction takes of a vector: Σ g and Σ g · (x - mean), or, where there is no g, Σ (x - mean) and Σ (x - mean)².
template <class Vector>
struct GradTermValues {
    Vector g, x;
};
template <class Vector>
struct MomentTermValues {
    Vector x;
};

// Both sums, lane by lane, in float64.
template <class T>
struct Sums {
    Doubles value[2] = {}, product[2] = {};

    INLINE void add(MomentTermValues<Floats> term, Floats mean) {
        const Wide<Floats> x(term.x), center(mean);
        const Doubles low = x.low - center.low, high = x.high - center.high;
        value[0] += low, value[1] += high;
        product[0] += low * low, product[1] += high * high;
    }
    INLINE void add(GradTermValues<Floats> term, Floats mean) {
        const Wide<Floats> g(term.g), x(term.x), center(mean);
        value[0] += g.low, value[1] += g.high;
        product[0] += g.low * (x.low - center.low), product[1] += g.high * (x.high - center.high);
    }
    INLINE void add(const Sums& other) {
        for (int half = 0; half < 2; ++half) value[half] += other.value[half], product[half] += other.product[half];
    }
    INLINE double total_value() const { return total(value[0] + value[1]); }
    INLINE double total_product() const { return total(product[0] + product[1]); }

    // Of the lane that stands for an interleaved channel.
    INLINE double value_of(int lane) const { return value[lane / half_width][lane % half_width]; }
    INLINE double product_of(int lane) const { return product[lane / half_width][lane % half_width]; }
    static constexpr int half_width = vector_bytes / 8;
};

// A sum that keeps what its rounding loses (Knuth's two-sum).
template <class Real>
struct ExactSum {
    Real sum = {}, lost = {};

    INLINE void add(Real term) {
        const Real next = sum + term, added = next - sum;
        lost += (sum - (next - added)) + (term - added);
        sum = next;
    }
    INLINE void add(const ExactSum& other) {
        add(other.sum);
        lost += other.lost;
    }
};

// float64 sums of float64 values have no digits to spare: with the rounding of x - mean and of the sums kept, they are as good as
// torch's at any mean and scale.
template <>
struct Sums<Float64> {
    ExactSum<Doubles> value, product;

    INLINE void add(MomentTermValues<Doubles> term, Doubles mean) {
        const Doubles d = term.x - mean, taken = term.x - d;
        value.add(d);
        value.lost += (term.x - (d + taken)) + (taken - mean);
        product.add(d * d);
    }
    INLINE void add(GradTermValues<Doubles> term, Doubles mean) {
        value.add(term.g);
        product.add(term.g * (term.x - mean));
    }
    INLINE void add(const Sums& other) {
        value.add(other.value);
        product.add(other.product);
    }
    INLINE double total_value() const { return total_of(value); }
    INLINE double total_product() const { return total_of(product); }
    INLINE double value_of(int lane) const { return value.sum[lane] + value.lost[lane]; }
    INLINE double product_of(int lane) const { return product.sum[lane] + product.lost[lane]; }

  private:
    static INLINE double total_of(const ExactSum<Doubles>& lanes) {
        ExactSum<double> sum;
        for (int lane = 0; lane < Float64::width; ++lane) sum.add(lanes.sum[lane]);
        return sum.sum + (sum.lost + total(lanes.lost));
    }
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
    INLINE Vector counted(Vector values, Vector others, int64_t m, Part part) const {
        if constexpr (!has_mask) return values;
        typename T::Mask counts = {};
        for (int lane = 0; lane < lanes(part); ++lane) counts[lane] = mask[m + lane] ? -1 : 0;
        return counts ? values : others;
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

// Lanes that do not count are given the value of the mean, and no gradient.
template <class E>
struct MomentTerm {
    const E& elements;

    template <class Part>
    INLINE MomentTermValues<typename E::Vector> operator()(
        int64_t i, int64_t m, const Channel<typename E::Vector>& channel, Part part) const {
        const auto x = elements.counted(E::T::load(elements.x + i, part), channel.mean, m, part);
        return {first(x, channel.mean, part)};
    }
};

template <class E>
struct GradTerm {
    const E& elements;

    template <class Part>
    INLINE GradTermValues<typename E::Vector> operator()(
        int64_t i, int64_t m, const Channel<typename E::Vector>& channel, Part part) const {
        typedef typename E::Vector Vector;
        const Vector x = elements.counted(E::T::load(elements.x + i, part), channel.mean, m, part);
        const Vector g = elements.counted(elements.grad(i, x - channel.mean, channel, part), Vector{}, m, part);
        return {first(g, Vector{}, part), first(x, channel.mean, part)};
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
        const auto y = elements.counted(elements.activation.value(z), typename E::Vector{}, m, part);
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
        const typename E::Vector nothing = {};
        const auto g = elements.counted(elements.grad(i, d, channel, part), nothing, m, part);
        const auto dx = g * channel.grad_scale + ((d * channel.rstd) * channel.slope + channel.level);
        return {elements.counted(dx, nothing, m, part), g};
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

}  // namespace
