// Loops over x as (M, C): M = N · S rows of C channels. Every lane of a vector belongs to another channel.
//
// The rows are cut into chunks, whose size depends on M and C alone. The reduction computes each chunk's sums, which are added in order.
// The map then runs over the chunks backwards, so that the cache still holds what the reduction read last. An x that exceeds the cache is
// read twice from memory: a row holds all channels, so no channel is complete before the last row.
//
// Where C is small or odd, several rows are joined: k rows of C channels are one row of k · C columns, aligned and longer than a vector.
// Channel c then has k sums, which are added at the end of the chunk.
//
// Under a mask a chunk holds counted rows. Rows to be joined that are not contiguous are copied first.
#pragma once

#include "kernels/columns.h"

namespace {

using batchnorm::Run;

constexpr int64_t shortest_row = 64;
constexpr int64_t longest_joint_row = 4096;

template <class T>
class Interleaved {
  public:
    typedef typename T::Element Element;
    Interleaved(Task& task, ColumnLoops<T> loops)
        : task(task),
          loops(loops),
          channels(task, joined_rows(task)),
          C(task.C),
          M(task.N * task.S),
          rows(rows_of_chunk(M)),
          chunks(divide_up(M, rows)),
          runs(mask_of_sums(task), task.counted, rows_of_chunk(task.counted)) {
        if (!mask_of_sums(task)) return;
        batchnorm::for_runs(task.mask, M, M, rows_of_chunk(task.counted), [&](int64_t chunk, Run run) { runs.add(chunk, run); });
    }

    void fused() {
        reduce();
        map_backwards();
    }

    void reduce() {
        const int64_t chunks = task.mask ? runs.chunks : this->chunks;
        double* sums = (double*)malloc(2 * C * chunks * sizeof(double));
        channels.begin_columns([&](int64_t c, auto lanes) { return typicals(c, lanes); });
        sum_chunks(loops.sum, chunks, sums);
        if (channels.finish(0, C, sums, sums + C, false)) {
            sum_chunks(loops.sum_again, chunks, sums);
            for (int64_t c = 0; c < C; ++c)
                if (channels.is_unfinished(c)) channels.finish(c, c + 1, sums + c, sums + C + c, true);
        }
        free(sums);
    }

    void map() {
        channels.set_all();
        map_backwards();
    }

  private:
    Task& task;
    const ColumnLoops<T> loops;
    Channels<T> channels;
    const int64_t C, M, rows, chunks;
    batchnorm::Chunked<Run> runs;

    int64_t rows_of_chunk(int64_t all_rows) const {
        const int64_t joint = channels.copies, values = at_least(chunk_values, divide_up(all_rows * C, most_chunks));
        return divide_up(divide_up(values, C), joint) * joint;
    }

    // The chunks' sums, added in order to those of the first.
    void sum_chunks(decltype(ColumnLoops<T>::sum) sum, int64_t chunks, double* sums) const {
        parallel(task.threads, chunks, [&](int64_t chunk) { sum_chunk(sum, chunk, sums + 2 * C * chunk); });
        for (int64_t chunk = 1; chunk < chunks; ++chunk)
            for (int64_t c = 0; c < 2 * C; ++c) sums[c] += sums[2 * C * chunk + c];
    }

    // A map can be cut at any row, so every thread has a piece.
    void map_backwards() const {
        const int64_t joint = channels.copies, shared = divide_up(divide_up(M, task.threads), joint) * joint;
        const int64_t length = at_most(rows, shared);
        const auto map = [&](int64_t piece) {
            map_rows(piece * length, at_most((piece + 1) * length, M));
            if (Simd::streams && task.from_memory) Simd::flush();
        };
        parallel(task.threads, divide_up(M, length), map, batchnorm::Order::backwards);
    }

    // A typical value of each channel of a vector, taken from four rows.
    template <class Lanes>
    typename T::Vector typicals(int64_t c, Lanes lanes) const {
        const auto row = [&](int64_t m) { return T::load((const Element*)task.x + m * C + c, lanes); };
        if (task.mask) return task.counted ? row(runs.begin(0)->first) : typename T::Vector{};
        return Channels<T>::middle(row(0), row(M / 4), row(M / 2), row(M / 4 * 3));
    }

    static int64_t joined_rows(const Task& task) {
        int64_t joint = 1;
        while (joint * task.C * sizeof(Element) % cache_line || joint * task.C < shortest_row) ++joint;
        if (joint * task.C <= longest_joint_row) return joint;
        return divide_up(shortest_row, task.C);
    }

    // body(rows) for rows m0 ... m1 - 1 as joined rows, then for the rest as one shorter row.
    template <class Body>
    void for_rows(int64_t m0, int64_t m1, const Body& body) const {
        const int64_t length = C * channels.copies, whole = (m1 - m0) / channels.copies;
        if (whole) body(Rows{m0 * C, whole, length, length});
        m0 += whole * channels.copies;
        if (m0 < m1) body(Rows{m0 * C, 1, length, (m1 - m0) * C});
    }

    // body(m0, m1, counted) for each run of rows that count, and of rows that do not.
    template <class Body>
    void for_counted_and_not(int64_t m, int64_t end, const Body& body) const {
        if (!task.mask) return body(m, end, true);
        while (m < end) {
            const bool counts = task.mask[m] != 0;
            const int64_t until = batchnorm::next(task.mask, m, end, !counts);
            body(m, until, counts);
            m = until;
        }
    }

    // Computes the sums of a chunk: Σ value and Σ product, (2, C).
    void sum_chunk(decltype(ColumnLoops<T>::sum) sum, int64_t chunk, double* totals) const {
        const int64_t length = C * channels.copies, vectors = divide_up(length, T::width);
        Sums<T>* sums = (Sums<T>*)aligned_alloc(cache_line, vectors * sizeof(Sums<T>));
        for (int64_t vector = 0; vector < vectors; ++vector) sums[vector] = {};
        if (task.mask) {
            sum_counted(sum, chunk, sums);
        } else {
            for_rows(chunk * rows, at_most((chunk + 1) * rows, M), [&](const Rows& taken) { sum(task, channels.table, taken, {}, sums); });
        }
        if (length == C && C % T::width == 0) {
            for (int64_t vector = 0; vector < vectors; ++vector)
                sums[vector].unpack(totals + vector * T::width, totals + C + vector * T::width);
            return free(sums);
        }
        double* columns = (double*)malloc(2 * vectors * T::width * sizeof(double));
        double* products = columns + vectors * T::width;
        for (int64_t vector = 0; vector < vectors; ++vector) sums[vector].unpack(columns + vector * T::width, products + vector * T::width);
        for (int64_t c = 0; c < C; ++c) {
            CompensatedSum<double> value, product;
            for (int64_t j = c; j < length; j += C) value.add(columns[j]), product.add(products[j]);
            totals[c] = value.sum + value.lost, totals[C + c] = product.sum + product.lost;
        }
        free(columns);
        free(sums);
    }

    // Sums the counted rows of a chunk as if they were contiguous. Rows at the end of a run that do not fill a joined row, or a block of
    // joined rows, are copied and wait for the rows of the next run.
    void sum_counted(decltype(ColumnLoops<T>::sum) sum, int64_t chunk, Sums<T>* sums) const {
        const int64_t joint = channels.copies, length = C * joint, together = joint * Sums<T>::vectors_together;
        const Copies<T> copies = {(Element*)malloc(tensors_of_a_sum * C * together * sizeof(Element)), C * together};
        int64_t waiting = 0;
        const auto wait = [&](int64_t m, int64_t count) {
            const void* const tensors[tensors_of_a_sum] = {task.x, task.dy, task.residual};
            for (int tensor = 0; tensor < tensors_of_both(task); ++tensor)
                memcpy(copies.first + tensor * copies.stride + waiting * C, (const Element*)tensors[tensor] + m * C,
                       count * C * sizeof(Element));
            waiting += count;
        };
        const auto sum_waiting = [&] {
            for_rows(0, waiting, [&](const Rows& taken) { sum(task, channels.table, taken, copies, sums); });
            waiting = 0;
        };
        for (const Run* run = runs.begin(chunk); run < runs.end(chunk); ++run) {
            int64_t m = run->first;
            const int64_t end = m + run->count;
            if (waiting) {
                const int64_t joining = at_most(together - waiting, end - m);
                wait(m, joining);
                m += joining;
                if (waiting < together) continue;
                sum_waiting();
            }
            const int64_t whole = (end - m) / together * together;
            if (whole) sum(task, channels.table, Rows{m * C, whole / joint, length, length}, {}, sums);
            m += whole;
            if (m < end) wait(m, end - m);
        }
        sum_waiting();
        free(copies.first);
    }

    void map_rows(int64_t begin, int64_t end) const {
        const Outputs<T, true> out(task);
        const bool aligned = C * channels.copies * sizeof(Element) % cache_line == 0;
        for_counted_and_not(begin, end, [&](int64_t m0, int64_t m1, bool counted) {
            if (!counted) return out.clear(m0 * C, m1 * C);
            const bool stream = Simd::streams && task.from_memory && aligned && out.to_alignment(m0 * C) == 0;
            for_rows(m0, m1, [&](const Rows& taken) { loops.map(task, channels.table, taken, stream, rows_of_map * taken.stride); });
        });
    }
};

}  // namespace
