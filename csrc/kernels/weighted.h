// Moments and input gradients under sample weights: each position (n, s) counts w times in the statistics of all channels.
//
//     mean = Σ w·x / Σ w        M2 = Σ w·(x - mean)²        dx = g · grad_scale + w · ((d · rstd) · slope + level)
//
// with the numbers of channels.h; in the gradient w is the share of Σ w. A position of weight 0 counts for nothing, whatever x holds there,
// but its gradient passes. Below 0 a weight is a mask: dx and dresidual are 0. The other verbs do not depend on weights.
//
// All sums are compensated sums of float64 products, in chunks of positions that depend on the sizes alone, so one loop for each layout
// serves every storage type: w·x is no longer exact, which the sums of float32 rely on. Activation and residual are checked for each vector.
#pragma once

#include "kernels/elements.h"

namespace {

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
    typedef Elements<T, AnyActivation<Vector>, Residual::optional, false> E;
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
        static INLINE Wide load(const double* from, Whole) {
            Wide wide;
            for (int number = 0; number < parts; ++number) wide.part[number] = load_vector<Doubles>(from + number * Float64::width);
            return wide;
        }
        static INLINE Wide load(const double* from, Partial lanes) {
            double buffer[T::width] = {};
            for (int lane = 0; lane < lanes.end; ++lane) buffer[lane] = from[lane];
            return load(buffer, Whole{});
        }
        // Rounded to the Real that maps compute in.
        INLINE Vector narrow() const {
            Vector vector;
            typename InFloat64<typename T::Real>::Storage::Element values[T::width];
            for (int number = 0; number < parts; ++number)
                InFloat64<typename T::Real>::Storage::store(values + number * Float64::width, part[number], Whole{});
            memcpy(&vector, values, sizeof vector);
            return vector;
        }
    };

    struct WeightedSums {
        CompensatedSum<Doubles> value[parts], product[parts];

        INLINE void add(const Wide& x, const Wide& center, const Wide& weight) {
            for (int number = 0; number < parts; ++number) {
                const Doubles w = weight.part[number], d = w <= 0.0 ? Doubles{} : x.part[number] - center.part[number];
                const Doubles counted = w <= 0.0 ? Doubles{} : w * d;  // NaN counts
                value[number].add(counted);
                product[number].add(counted * d);
            }
        }
        static INLINE double total(const CompensatedSum<Doubles>* sums) {
            CompensatedSum<double> all;
            for (int number = 0; number < parts; ++number)
                for (int lane = 0; lane < Float64::width; ++lane) {
                    all.add(sums[number].sum[lane]);
                    all.lost += sums[number].lost[lane];
                }
            return all.sum + all.lost;
        }
        static void unpack(const CompensatedSum<Doubles>* sums, double* to, int64_t count) {
            for (int64_t lane = 0; lane < count; ++lane) {
                const CompensatedSum<Doubles>& part = sums[lane / Float64::width];
                to[lane] = part.sum[lane % Float64::width] + part.lost[lane % Float64::width];
            }
        }
    };

    void moments() {
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
    void sum_all(bool again, double* sums) const {
        if (task.interleaved) {
            parallel(task.threads, chunks, [&](int64_t chunk) { sum_rows(chunk, again, sums + 2 * C * chunk); });
        } else {
            parallel(task.threads, chunks * C, [&](int64_t number) {
                const int64_t chunk = number / C, c = number % C;
                if (!again || channels.is_unfinished(c)) sum_channel(chunk, c, again, sums + 2 * C * chunk);
            });
        }
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
            for (int64_t c = 0; c < 2 * C; ++c) sums[c] += sums[2 * C * chunk + c];
    }

    Wide center_of(Vector mean, bool again) const { return Sums<T>::about_zero && !again ? Wide::of(0.0) : Wide::of(mean); }

    static INLINE void add(const Vector& x, const Wide& center, const Wide& weight, Whole, WeightedSums& sums) {
        sums.add(Wide::of(x), center, weight);
    }
    static NOINLINE void add(const Vector& x, const Wide& center, const Wide& weight, Partial, WeightedSums& sums) {
        sums.add(Wide::of(x), center, weight);
    }

    // Planar: the sums of one channel over a chunk of positions.
    void sum_channel(int64_t chunk, int64_t c, bool again, double* totals) const {
        const Wide center = center_of(channels.table.of(c).mean, again);
        WeightedSums sums;
        for_row_pieces(chunk, [&](int64_t n, int64_t s, int64_t count) {
            const Element* x = (const Element*)task.x + (n * C + c) * S + s;
            const double* weights = task.weights + n * S + s;
            for_vectors(count, [&](int64_t i, auto lanes)
                                   INLINED { add(T::load(x + i, lanes), center, Wide::load(weights + i, lanes), lanes, sums); });
        });
        totals[c] = WeightedSums::total(sums.value), totals[C + c] = WeightedSums::total(sums.product);
    }

    // Interleaved: the sums of all channels over a chunk of rows.
    void sum_rows(int64_t chunk, bool again, double* totals) const {
        const int64_t vectors = divide_up(C, T::width), end = at_most((chunk + 1) * positions, M);
        WeightedSums* sums = (WeightedSums*)aligned_alloc(cache_line, divide_up(vectors * sizeof(WeightedSums), cache_line) * cache_line);
        for (int64_t vector = 0; vector < vectors; ++vector) sums[vector] = {};
        for (int64_t m = chunk * positions; m < end; m += rows_together) {
            const int64_t rows = at_most(rows_together, end - m);
            for_vectors(C, [&](int64_t c, auto lanes) INLINED {
                const Wide center = center_of(channels.table.from(c).mean, again);
                WeightedSums here = sums[c / T::width];
                for (int64_t row = m; row < m + rows; ++row)
                    add(T::load((const Element*)task.x + row * C + c, lanes), center, Wide::of(task.weights[row]), lanes, here);
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
        parallel(task.threads, task.interleaved ? chunks : chunks * C,
                 [&](int64_t number) { task.interleaved ? map_rows(number) : map_channel(number / C, number % C); });
    }

    void map_channel(int64_t chunk, int64_t c) const {
        const E elements(task);
        const Outputs<T, true> out(task);
        const Channel<Vector> channel = channels.table.of(c);
        for_row_pieces(chunk, [&](int64_t n, int64_t s, int64_t count) {
            const int64_t first = (n * C + c) * S + s;
            const double* weights = task.weights + n * S + s;
            for_vectors(count, [&](int64_t i, auto lanes)
                                   INLINED { map(first + i, channel, Wide::load(weights + i, lanes).narrow(), lanes, elements, out); });
        });
    }

    void map_rows(int64_t chunk) const {
        const E elements(task);
        const Outputs<T, true> out(task);
        for (int64_t m = chunk * positions; m < at_most((chunk + 1) * positions, M); ++m) {
            const Vector weight = Wide::of(task.weights[m]).narrow();
            for_vectors(C, [&](int64_t c, auto lanes) INLINED { map(m * C + c, channels.table.from(c), weight, lanes, elements, out); });
        }
    }

    static INLINE void map(int64_t i, const Channel<Vector>& channel, const Vector& weight, Whole lanes, const E& elements,
                           const Outputs<T, true>& out) {
        out.store(i, written(i, channel, weight, lanes, elements), lanes);
    }
    static NOINLINE void map(int64_t i, const Channel<Vector>& channel, const Vector& weight, Partial lanes, const E& elements,
                             const Outputs<T, true>& out) {
        out.store(i, written(i, channel, weight, lanes, elements), lanes);
    }

    template <class Lanes>
    static INLINE Written<Vector> written(int64_t i, const Channel<Vector>& channel, const Vector& weight, Lanes lanes, const E& elements) {
        const Vector d = elements.deviation(i, channel, lanes), g = elements.grad(i, d, channel, lanes);
        const Vector own = g * channel.grad_scale;
        const Vector through = weight * Simd::multiply_add(d * channel.rstd, channel.slope, channel.level);
        const Vector dx = weight == 0 ? own : own + through;
        return {weight < 0 ? Vector{} : dx, weight < 0 ? Vector{} : g};
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

    // body(i, Whole) for the vectors of `count` elements, then body(i, Partial) for the rest.
    template <class Body>
    static INLINE void for_vectors(int64_t count, const Body& body) {
        int64_t i = 0;
        for (; i + T::width <= count; i += T::width) body(i, Whole{});
        if (i < count) body(i, Partial{(int)(count - i)});
    }
};

}  // namespace
