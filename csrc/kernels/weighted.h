// Moments and input gradients under sample weights: each position (n, s) counts w times in the statistics of all channels.
//
//     mean = Σ w·x / Σ w        M2 = Σ w·(x - mean)²        dx = g · grad_scale + w · ((d · rstd) · slope + level)
//
// with the numbers of channels.h; in the gradient w is the share of Σ w. A position of weight 0 counts for nothing, whatever x holds there,
// but its gradient passes. Below 0 a weight is a mask: dx and dresidual are 0. The other verbs do not depend on weights.
//
// All sums are float64, in chunks of positions that depend on the sizes alone. These loops are rarer than those without weights, and
// compiled once for each storage type: activation, residual and the shorter last vector are looked up at each vector.
#pragma once

#include "kernels/elements.h"

namespace {

// The sum of a vector of float64 terms, lane by lane: plain, or compensated for float64 tensors, which have no bits to spare.
template <class T>
struct SumUnderWeights {
    Doubles sum = {};

    INLINE void add(Doubles term) { sum += term; }
    INLINE Doubles lanes() const { return sum; }
    INLINE double total() const { return ::total(sum); }
};
template <>
struct SumUnderWeights<Float64> : CompensatedSum<Doubles> {
    INLINE Doubles lanes() const { return sum + lost; }
};

template <class T>
class Weighted {
  public:
    explicit Weighted(Task& task) : task(task), channels(task, 1), N(task.N), C(task.C), S(task.S), M(task.N * task.S) {
        const int64_t row = task.interleaved ? C : 1;  // values of a position that one thread adds
        positions = divide_up(at_least(chunk_values, divide_up(M * row, most_chunks)), row);
        chunks = divide_up(M, positions);
    }

    void run() { task.verb == Verb::moments ? moments() : input_grad(); }

  private:
    typedef typename T::Element Element;
    typedef typename T::Vector Vector;
    typedef Elements<T, AnyActivation<Vector, 1>, Residual::optional, false> E;
    static constexpr int parts = T::width / Float64::width;  // vectors of float64 that hold the lanes of a Vector
    static constexpr int64_t rows_together = 8;

    Task& task;
    Channels<T> channels;
    const int64_t N, C, S, M;
    int64_t positions, chunks;

    // The weights of a vector's lanes, or the numbers of a channel, in float64.
    struct Wide {
        Doubles part[parts];

        static INLINE Wide of(Vector values) {
            Wide wide;
            if constexpr (parts == 1) {
                wide.part[0] = values;
            } else {
                const ::Wide halves(values);
                wide.part[0] = halves.low, wide.part[1] = halves.high;
            }
            return wide;
        }
        static INLINE Wide of(double value) {
            Wide wide;
            for (Doubles& part : wide.part) part = Doubles{} + value;
            return wide;
        }
        static INLINE Wide load(const double* from, int64_t count) {
            if (count < T::width) return load_partial(from, count);
            Wide wide;
            for (int number = 0; number < parts; ++number) wide.part[number] = load_vector<Doubles>(from + number * Float64::width);
            return wide;
        }
        static NOINLINE Wide load_partial(const double* from, int64_t count) {
            double buffer[T::width] = {};
            memcpy(buffer, from, count * sizeof(double));
            return load(buffer, T::width);
        }
        // Rounded to the Real that maps compute in; a NaN as in `Channels::set`.
        INLINE Vector narrow() const {
            Vector vector;
            typename InFloat64<typename T::Real>::Storage::Element values[T::width];
            for (int number = 0; number < parts; ++number) {
                Doubles numbers = part[number];
                if constexpr (sizeof(Element) == 2) numbers = numbers == numbers ? numbers : Doubles{} + __builtin_nan("");
                InFloat64<typename T::Real>::Storage::store(values + number * Float64::width, numbers, Whole{});
            }
            memcpy(&vector, values, sizeof vector);
            return vector;
        }
    };

    struct WeightedSums {
        SumUnderWeights<T> value[parts], product[parts];

        INLINE void add(const Wide& x, const Wide& center, const Wide& weight) {
            for (int number = 0; number < parts; ++number) {
                const Doubles w = weight.part[number], d = w <= 0.0 ? Doubles{} : x.part[number] - center.part[number];
                const Doubles counted = w <= 0.0 ? Doubles{} : w * d;  // NaN counts
                value[number].add(counted);
                product[number].add(counted * d);
            }
        }
        static INLINE double total(const SumUnderWeights<T>* sums) {
            double all = 0.0;
            for (int number = 0; number < parts; ++number) all += sums[number].total();
            return all;
        }
        static NOINLINE void unpack(const SumUnderWeights<T>* sums, double* to, int64_t count) {
            for (int64_t lane = 0; lane < count; ++lane) to[lane] = sums[lane / Float64::width].lanes()[lane % Float64::width];
        }
    };

    NOINLINE void moments() {
        double* sums = (double*)malloc(2 * C * chunks * sizeof(double));
        int64_t first = 0;  // that counts
        while (first < M && task.weights[first] <= 0.0) ++first;
        const auto at = [&](int64_t c) { return task.interleaved ? first * C + c : (first / S * C + c) * S + first % S; };
        channels.begin(0, C, [&](int64_t c) { return first < M ? T::load_one((const Element*)task.x + at(c)) : 0.0; });
        sum_all(false, sums);
        if (channels.finish(0, C, sums, sums + C, false)) {
            sum_all(true, sums);
            for (int64_t c = 0; c < C; ++c)
                if (channels.is_unfinished(c)) channels.finish(c, c + 1, sums + c, sums + C + c, true);
        }
        free(sums);
    }

    // The sums of each chunk, (2, C), added in order to those of the first.
    NOINLINE void sum_all(bool again, double* sums) const {
        for_pieces([&](int64_t chunk, int64_t c) {
            double* totals = sums + 2 * C * chunk;
            if (task.interleaved) return sum_rows(chunk, again, totals);
            if (!again || channels.is_unfinished(c)) sum_channel(chunk, c, again, totals);
        });
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
            for (int64_t c = 0; c < 2 * C; ++c) sums[c] += sums[2 * C * chunk + c];
    }

    Wide center_of(Vector mean, bool again) const { return Sums<T>::about_zero && !again ? Wide::of(0.0) : Wide::of(mean); }

    static INLINE Wide load(const Element* from, int64_t count) {
        return Wide::of(count < T::width ? T::load(from, Partial{(int)count}) : T::load(from, Whole{}));
    }

    // Planar: the sums of one channel over a chunk of positions.
    NOINLINE void sum_channel(int64_t chunk, int64_t c, bool again, double* totals) const {
        const Wide center = center_of(channels.table.of(c).mean, again);
        WeightedSums sums;
        for_row_pieces(chunk, [&](int64_t n, int64_t s, int64_t count) {
            const Element* x = (const Element*)task.x + (n * C + c) * S + s;
            const double* weights = task.weights + n * S + s;
            for_vectors(count,
                        [&](int64_t i, int64_t left) INLINED { sums.add(load(x + i, left), center, Wide::load(weights + i, left)); });
        });
        totals[c] = WeightedSums::total(sums.value), totals[C + c] = WeightedSums::total(sums.product);
    }

    // Interleaved: the sums of all channels over a chunk of rows.
    NOINLINE void sum_rows(int64_t chunk, bool again, double* totals) const {
        const int64_t vectors = divide_up(C, T::width), end = at_most((chunk + 1) * positions, M);
        WeightedSums* sums = (WeightedSums*)aligned_alloc(cache_line, divide_up(vectors * sizeof(WeightedSums), cache_line) * cache_line);
        for (int64_t vector = 0; vector < vectors; ++vector) sums[vector] = {};
        for (int64_t m = chunk * positions; m < end; m += rows_together) {
            const int64_t rows = at_most(rows_together, end - m);
            for_vectors(C, [&](int64_t c, int64_t left) INLINED {
                const Wide center = center_of(channels.table.from(c).mean, again);
                WeightedSums here = sums[c / T::width];
                for (int64_t row = m; row < m + rows; ++row)
                    here.add(load((const Element*)task.x + row * C + c, left), center, Wide::of(task.weights[row]));
                sums[c / T::width] = here;
            });
        }
        for (int64_t vector = 0, c = 0; vector < vectors; ++vector, c += T::width) {
            WeightedSums::unpack(sums[vector].value, totals + c, at_most(T::width, C - c));
            WeightedSums::unpack(sums[vector].product, totals + C + c, at_most(T::width, C - c));
        }
        free(sums);
    }

    void input_grad() {
        channels.set_all();
        for_pieces([&](int64_t chunk, int64_t c) { task.interleaved ? map_rows(chunk) : map_channel(chunk, c); });
    }

    NOINLINE void map_channel(int64_t chunk, int64_t c) const {
        const E elements(task);
        const Outputs<T, true> out(task);
        const Channel<Vector> channel = channels.table.of(c);
        for_row_pieces(chunk, [&](int64_t n, int64_t s, int64_t count) {
            const int64_t first = (n * C + c) * S + s;
            const double* weights = task.weights + n * S + s;
            for_vectors(count, [&](int64_t i, int64_t left)
                                   INLINED { map(first + i, left, channel, Wide::load(weights + i, left).narrow(), elements, out); });
        });
    }

    NOINLINE void map_rows(int64_t chunk) const {
        const E elements(task);
        const Outputs<T, true> out(task);
        for (int64_t m = chunk * positions; m < at_most((chunk + 1) * positions, M); ++m) {
            const Vector weight = Wide::of(task.weights[m]).narrow();
            for_vectors(C, [&](int64_t c, int64_t left) INLINED { map(m * C + c, left, channels.table.from(c), weight, elements, out); });
        }
    }

    static INLINE void map(int64_t i, int64_t count, const Channel<Vector>& channel, const Vector& weight, const E& elements,
                           const Outputs<T, true>& out) {
        count < T::width ? map(i, channel, weight, Partial{(int)count}, elements, out) : map(i, channel, weight, Whole{}, elements, out);
    }
    template <class Lanes>
    static NOINLINE void map(int64_t i, const Channel<Vector>& channel, const Vector& weight, Lanes lanes, const E& elements,
                             const Outputs<T, true>& out) {
        const Vector d = elements.deviation(i, channel, lanes);
        const Vector g = elements.grads(Places<1>{{i}}, Several<Vector, 1>{{d}}, channel, lanes).at[0];
        const Vector own = g * channel.grad_scale;
        const Vector through = weight * Simd::multiply_add(d * channel.rstd, channel.slope, channel.level);
        const Vector dx = weight == 0 ? own : own + through;
        out.store(i, {weight < 0 ? Vector{} : dx, weight < 0 ? Vector{} : g}, lanes);
    }

    // body(chunk, c) on several threads: for each channel of a planar tensor, and once for all channels of an interleaved one.
    template <class Body>
    void for_pieces(const Body& body) const {
        const int64_t apart = task.interleaved ? 1 : C;
        parallel(task.threads, chunks * apart, [&](int64_t number) { body(number / apart, number % apart); });
    }

    // body(n, s, count) for the pieces of rows in a chunk of positions.
    template <class Body>
    void for_row_pieces(int64_t chunk, const Body& body) const {
        const int64_t end = at_most((chunk + 1) * positions, M);
        for (int64_t m = chunk * positions; m < end;) {
            const int64_t s = m % S, count = at_most(S - s, end - m);
            body(m / S, s, count);
            m += count;
        }
    }

    // body(i, count) for the vectors of `count` elements; the last may be shorter.
    template <class Body>
    static INLINE void for_vectors(int64_t count, const Body& body) {
        for (int64_t i = 0; i < count; i += T::width) body(i, at_most(count - i, T::width));
    }
};

}  // namespace
