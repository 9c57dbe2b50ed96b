// x as (M, C): M = N · S rows, in each row the channels side by side; every lane is a channel of its own.
//
// Rows are cut into chunks that depend on M and C alone. The reduction gives each chunk's sums, which are added in order; then the
// map runs over the chunks backwards, so that what the reduction read last is found in the cache. x is read twice from memory
// where it exceeds the cache: a row holds all channels, and none is complete before the last row.
//
// Several rows count as one where C is small or odd: k rows of C channels are one row of k · C, aligned and longer than a vector,
// and channel c has k sums, which are added at the end of the chunk.
#pragma once

#include "planar.h"

namespace {

constexpr int64_t most_chunks = 64;
constexpr int64_t rows_at_once = 8;  // that share a channel's numbers, and one trip of its sums to memory and back
constexpr int64_t shortest_row = 64;
constexpr int64_t longest_joint_row = 4096;

template <class T>
class Interleaved {
  public:
    typedef typename T::Real Real;
    typedef typename T::Element Element;
    typedef typename T::Vector Vector;

    explicit Interleaved(Task& task)
        : task(task), channels(task, joined_rows(task)), C(task.C), M(task.N * task.S) {
        const int64_t joint = channels.copies, values = at_least(chunk_values, divide_up(M * C, most_chunks));
        rows = divide_up(divide_up(values, C), joint) * joint;
        chunks = divide_up(M, rows);
    }

    template <class Term, class Map>
    void fused(const Term& term, const Map& map, int tensors) {
        reduce(term, tensors);
        map_backwards(map);
    }

    template <class Term>
    void reduce(const Term& term, int) {
        double* sums = (double*)malloc(2 * C * chunks * sizeof(double));
        for (int64_t c = 0; c < C; ++c) channels.begin(c, typical(c));
        bool* open = (bool*)malloc(C);
        memset(open, true, C);
        bool more = true;
        for (bool last = false; more; last = true) {
            parallel(task.threads, chunks, [&](int64_t chunk) { sum_chunk(chunk, term, sums + 2 * C * chunk); });
            more = false;
            for (int64_t chunk = 1; chunk < chunks; ++chunk)
                for (int64_t c = 0; c < 2 * C; ++c) sums[c] += sums[2 * C * chunk + c];
            for (int64_t c = 0; c < C; ++c) {
                if (open[c]) open[c] = !channels.finish(c, sums[c], sums[C + c], last);
                more |= open[c];
            }
        }
        free(open);
        free(sums);
    }

    template <class Map>
    void map(const Map& map) {
        channels.set_all();
        map_backwards(map);
    }

  private:
    Task& task;
    Channels<T> channels;
    const int64_t C, M;
    int64_t rows, chunks;

    template <class Map>
    void map_backwards(const Map& map) {
        parallel(task.threads, chunks, [&](int64_t number) {
            map_chunk(chunks - 1 - number, map);
            if (task.stream) end_streaming();
        });
    }

    // A typical value of the channel, from four rows.
    double typical(int64_t c) const {
        if (task.mask) {
            int64_t m = 0;
            while (m < M && !task.mask[m]) ++m;
            return m < M ? value(m, c) : 0.0;
        }
        return Channels<T>::middle(value(0, c), value(M / 4, c), value(M / 2, c), value(M / 4 * 3, c));
    }

    static int64_t joined_rows(const Task& task) {
        if (task.mask) return 1;  // whole rows are left out
        int64_t joint = 1;
        while (joint * task.C * sizeof(Element) % cache_line || joint * task.C < shortest_row) ++joint;
        if (joint * task.C <= longest_joint_row) return joint;
        return divide_up(shortest_row, task.C);
    }

    double value(int64_t m, int64_t c) const { return (double)T::load((const Element*)task.x + m * C + c, Some{1})[0]; }

    // The sums of a chunk: (2, C), Σ value and Σ product.
    template <class Term>
    __attribute__((noinline)) void sum_chunk(int64_t chunk, const Term& term, double* totals) {
        const int64_t length = channels.length, end = at_most((chunk + 1) * rows, M) * C;
        Sums<T>* sums = (Sums<T>*)aligned_alloc(cache_line, divide_up(length, T::width) * sizeof(Sums<T>));
        for (int64_t j = 0; j < length; j += T::width) sums[j / T::width] = {};
        int64_t i = chunk * rows * C;
        if (!task.mask)
            for (; i + rows_at_once * length <= end; i += rows_at_once * length)
                for_columns(length, [&](int64_t j, auto part) {
                    const Channel<Vector> channel = channels.from(j);
                    Sums<T> here = sums[j / T::width];
                    for (int64_t row = i + j; row < i + j + rows_at_once * length; row += length)
                        here.add(term(row, 0, channel, part), channel.mean);
                    sums[j / T::width] = here;
                });
        for (; i < end; i += length)
            if (!task.mask || task.mask[i / C])
                for_columns(at_most(length, end - i), [&](int64_t j, auto part) {
                    const Channel<Vector> channel = channels.from(j);
                    sums[j / T::width].add(term(i + j, 0, channel, part), channel.mean);
                });
        for (int64_t c = 0; c < C; ++c) {
            ExactSum<double> value, product;
            for (int64_t j = c; j < length; j += C) {
                value.add(sums[j / T::width].value_of(j % T::width));
                product.add(sums[j / T::width].product_of(j % T::width));
            }
            totals[c] = value.sum + value.lost, totals[C + c] = product.sum + product.lost;
        }
        free(sums);
    }

    template <class Map>
    __attribute__((noinline)) void map_chunk(int64_t chunk, const Map& map) {
        const int64_t length = channels.length, end = at_most((chunk + 1) * rows, M) * C;
        const Outputs<T> out = {(Element*)task.output, (Element*)task.dresidual};
        const bool stream = task.stream && length * sizeof(Element) % cache_line == 0 && out.to_alignment() == 0;
        int64_t i = chunk * rows * C;
        if (!task.mask)
            for (; i + 4 * length <= end; i += 4 * length)
                for_columns(length, [&](int64_t j, auto part) {
                    const Channel<Vector> channel = channels.from(j);
                    for (int64_t row = i + j; row < i + j + 4 * length; row += length)
                        write(out, row, map(row, 0, channel, part), part, stream);
                });
        for (; i < end; i += length) {
            const bool counted = !task.mask || task.mask[i / C];
            for_columns(at_most(length, end - i), [&](int64_t j, auto part) {
                const Written<Vector> nothing = {};
                write(out, i + j, counted ? map(i + j, 0, channels.from(j), part) : nothing, part, stream);
            });
        }
    }

    static INLINE void write(const Outputs<T>& out, int64_t i, const Written<Vector>& values, Whole, bool stream) {
        if (stream) return out.stream(i, values);
        out.store(i, values, Whole{});
    }
    static INLINE void write(const Outputs<T>& out, int64_t i, const Written<Vector>& values, Some some, bool) {
        out.store(i, values, some);
    }

    // body(j, Whole) for each vector of a row, body(j, Some) for what is left.
    template <class Body>
    static INLINE void for_columns(int64_t length, const Body& body) {
        int64_t j = 0;
        for (; j + T::width <= length; j += T::width) body(j, Whole{});
        if (j < length) body(j, Some{(int)(length - j)});
    }
};

}  // namespace
