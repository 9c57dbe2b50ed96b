// x as (N, C, S): a channel is N rows of S neighbors, C · S apart.
//
// A task takes a channel, or a block of channels when planes are small, through both passes, so that the second one finds x in the
// cache: one read and one write of memory. The blocks also make long runs of short rows (7x7 planes are 196 bytes). When there
// are too few channels for the threads, the channel itself is cut instead, and the passes are apart.
//
// Sums are the same in every case: a channel is cut into chunks of at most 64K values, by N and S alone, which are added in order.
// Under a mask the chunks are of counted values: long runs of them are summed where they lie, short ones gathered first.
#pragma once

#include "columns.h"

namespace {

constexpr int64_t block_channels = 64;       // their sums, 16 KB on the stack, stay in the first-level cache
constexpr int64_t block_bytes = 512 * 1024;  // of all tensors that both passes read: half of a 1 MB second-level cache
constexpr int64_t short_plane = 128;         // values; shorter planes are taken side by side, as columns
constexpr int64_t most_columns = 4096;
constexpr int64_t gathered_values = 1024;  // of each tensor, in the first-level cache
constexpr int64_t bytes_ahead = 8192;  // of what is read, asked for before

// Rows n0 ... n1 - 1 and in each the elements s0 ... s1 - 1.
struct Span {
    int64_t n0, n1, s0, s1;
};

template <class T>
class Planar {
  public:
    typedef typename T::Real Real;
    typedef typename T::Element Element;
    typedef typename T::Vector Vector;
    static constexpr int64_t ahead = bytes_ahead / sizeof(Element), vectors_together = vectors_of_block * T::width;

    explicit Planar(Task& task)
        : task(task),
          channels(task, 1),
          N(task.N),
          C(task.C),
          S(task.S),
          runs(task.mask, N * S, S, task.counted, chunk_values),
          from_memory(task.stream) {
        row_values = at_most(S, chunk_values);
        rows = at_most(at_least(chunk_values / at_least(S, 1), 1), at_least(N, 1));
        chunks_of_row = divide_up(S, row_values);
        chunks = task.mask ? runs.chunks : divide_up(N, rows) * chunks_of_row;
        const bool many_rows = N >= vectors_of_block, short_rows = many_rows && S < short_plane;
        sums_by_columns = short_rows && !task.mask;
        // Around the cache only whole lines go well, and the ends of such rows are a good part of them.
        maps_by_columns = short_rows || S < T::width || (many_rows && task.stream && S < 4 * short_plane && S * sizeof(Element) % cache_line);
    }

    // Both passes over one block of channels after the other.
    template <class Term, class Map>
    void fused(const Term& term, const Map& map, int tensors) {
        const int64_t block = channels_per_task(tensors), tasks = divide_up(C, block);
        if (too_few(tasks)) {
            reduce_split(term);
            return map_in_order(map);
        }
        parallel(task.threads, tasks, [&](int64_t number) {
            const int64_t c0 = number * block, c1 = at_most(c0 + block, C);
            const int64_t next = from_memory && number + task.threads < tasks ? block * S * task.threads : 0;
            reduce_block(c0, c1, term);
            map_span(c0, c1, {0, N, 0, S}, map, next);
            if (task.stream) end_streaming();
        });
    }

    template <class Term>
    void reduce(const Term& term, int tensors) {
        const int64_t block = channels_per_task(tensors), tasks = divide_up(C, block);
        if (too_few(tasks)) return reduce_split(term);
        parallel(task.threads, tasks, [&](int64_t number) {
            reduce_block(number * block, at_most((number + 1) * block, C), term);
        });
    }

    template <class Map>
    void map(const Map& map) {
        channels.set_all();
        map_in_order(map);
    }

  private:
    Task& task;
    Channels<T> channels;
    const int64_t N, C, S;
    const batchnorm::CountedRuns runs;
    int64_t rows, row_values, chunks_of_row, chunks;
    bool sums_by_columns, maps_by_columns;
    // Then the next block is asked for while one is mapped. The last cache is near enough without, and allows larger blocks: longer runs.
    const bool from_memory;

    // A map alone runs through memory as it lies.
    template <class Map>
    void map_in_order(const Map& map) {
        const int64_t in_order = at_most(at_least(chunk_values / at_least(S, 1), 1), C);
        const int64_t block = maps_by_columns ? channels_per_task(1) : in_order, blocks = divide_up(C, block);
        const int64_t samples = maps_by_columns ? rows : blocks > 1 ? 1 : at_least(chunk_values / (C * S), 1);
        const int64_t pieces = divide_up(N, samples);
        parallel(task.threads, pieces * blocks * chunks_of_row, [&](int64_t number) {
            const int64_t s = number % chunks_of_row, rest = number / chunks_of_row;
            const int64_t c0 = rest % blocks * block, n0 = rest / blocks * samples;
            map_span(c0, at_most(c0 + block, C),
                     {n0, at_most(n0 + samples, N), s * row_values, at_most((s + 1) * row_values, S)}, map, 0);
            if (task.stream) end_streaming();
        });
    }

    // A typical value of the channel, from its first row: the quarters of it.
    double typical(int64_t c) const {
        if (task.mask) {
            if (!task.counted) return 0.0;
            const int64_t m = runs.begin(0)->first;
            return value(m / S, c, m % S);
        }
        return Channels<T>::middle(value(0, c, 0), value(0, c, S / 4), value(0, c, S / 2), value(0, c, S / 4 * 3));
    }

    double value(int64_t n, int64_t c, int64_t s) const {
        return (double)T::load((const Element*)task.x + (n * C + c) * S + s, Some{1})[0];
    }

    int64_t channels_per_task(int tensors) const {
        const int64_t channel_bytes = at_least(N * S * (int64_t)sizeof(Element) * tensors, 1);
        const int64_t bytes = from_memory ? block_bytes : 2 * block_bytes;
        const int64_t cached = at_least(bytes / channel_bytes, 1), shared = divide_up(C, 4 * (int64_t)task.threads);
        const int64_t block = at_most(at_most(cached, shared), block_channels);
        if (!maps_by_columns) return block;
        const int64_t plane = S * sizeof(Element), odd = plane & -plane, lines = at_least(cache_line / odd, 1);
        return at_least(at_most(block, most_columns / S) / lines * lines, lines);  // whole cache lines
    }

    // Whether threads would wait for one another more than half as long as they work.
    bool too_few(int64_t tasks) const {
        return task.threads > 1 && divide_up(tasks, task.threads) * task.threads * 2 > tasks * 3 && chunks > 1;
    }

    Span chunk(int64_t number) const {
        const int64_t n0 = number / chunks_of_row * rows, s0 = number % chunks_of_row * row_values;
        return {n0, at_most(n0 + rows, N), s0, at_most(s0 + row_values, S)};
    }

    template <class Term>
    void reduce_block(int64_t c0, int64_t c1, const Term& term) {
        double values[block_channels], products[block_channels];
        channels.begin(c0, c1, [&](int64_t c) { return typical(c); });
        sum_chunks(c0, c1, term, values, products);
        if (!channels.finish(c0, c1, values, products, false)) return;
        for (int64_t c = c0; c < c1; ++c) {
            if (!channels.is_open(c)) continue;
            sum_chunks(c, c + 1, term.again(), values, products);
            channels.finish(c, c + 1, values, products, true);
        }
    }

    template <class Term>
    void sum_chunks(int64_t c0, int64_t c1, const Term& term, double* values, double* products) {
        double value[block_channels], product[block_channels];
        for (int64_t c = 0; c < c1 - c0; ++c) values[c] = products[c] = 0.0;
        for (int64_t number = 0; number < chunks; ++number) {
            sum_chunk(c0, c1, number, term, value, product);
            for (int64_t c = 0; c < c1 - c0; ++c) values[c] += value[c], products[c] += product[c];
        }
    }

    // Chunk by chunk on all threads, then the same additions in the same order as in `sum_chunks`.
    template <class Term>
    void reduce_split(const Term& term) {
        double* sums = (double*)malloc(2 * C * (chunks + 1) * sizeof(double));
        double *values = sums + 2 * C * chunks, *products = values + C;
        channels.begin(0, C, [&](int64_t c) { return typical(c); });
        const auto sum = [&](const auto& term, bool again) {
            parallel(task.threads, C * chunks, [&](int64_t number) {
                const int64_t c = number / chunks;
                if (again && !channels.is_open(c)) return;
                sum_chunk(c, c + 1, number % chunks, term, sums + 2 * number, sums + 2 * number + 1);
            });
            for (int64_t c = 0; c < C; ++c) {
                values[c] = products[c] = 0.0;
                for (int64_t number = c * chunks; number < (c + 1) * chunks; ++number)
                    values[c] += sums[2 * number], products[c] += sums[2 * number + 1];
            }
        };
        sum(term, false);
        if (channels.finish(0, C, values, products, false)) {
            sum(term.again(), true);
            for (int64_t c = 0; c < C; ++c)
                if (channels.is_open(c)) channels.finish(c, c + 1, values + c, products + c, true);
        }
        free(sums);
    }

    // The sums of one chunk of channels c0 ... c1 - 1.
    template <class Term>
    __attribute__((noinline)) void sum_chunk(
        int64_t c0, int64_t c1, int64_t number, const Term& term, double* values, double* products) {
        if constexpr (Term::has_mask) return sum_counted(c0, c1, number, term, values, products);
        const Span span = chunk(number);
        if (sums_by_columns) return sum_columns_of(c0, c1, span, term, values, products);
        Sums<T> sums[block_channels];
        const int64_t width = span.s1 - span.s0, length = (c1 - c0) * width;
        for (int64_t n = span.n0; n < span.n1; ++n) {
            const int64_t run = (n * C + c0) * S + span.s0;
            const int64_t next = n + 1 < span.n1 ? run + C * S : (span.n0 * C + c1) * S + span.s0;
            for (int64_t c = c0; c < c1; ++c) {
                const int64_t at = (c - c0) * S;
                Sums<T> odd;
                sum_row(run + at, width, length - at, next - length - run, channels.table.of(c), term, sums[c - c0], odd);
                sums[c - c0].add(odd);
            }
        }
        for (int64_t c = 0; c < c1 - c0; ++c) values[c] = sums[c].total_value(), products[c] = sums[c].total_product();
    }

    template <class Term>
    void sum_counted(int64_t c0, int64_t c1, int64_t number, const Term& term, double* values, double* products) const {
        constexpr int64_t apart = gathered_values + T::width;
        alignas(cache_line) Element copies[tensors_of_a_sum * apart];
        const auto gathered = term.over(copies, apart);
        for (int64_t c = c0; c < c1; ++c) {
            const Channel<Vector> channel = channels.table.of(c);
            Sums<T> even, odd;
            int64_t filled = 0;
            const auto flush = [&]() INLINED {
                sum_row(0, filled, filled, 0, channel, gathered, even, odd);
                filled = 0;
            };
            for (const batchnorm::Run* run = runs.begin(number); run < runs.end(number); ++run) {
                const int64_t n = run->first / S, plane_end = (n * C + c + 1) * S;
                int64_t i = (n * (C - 1) + c) * S + run->first, left = run->count;
                while (left > 0) {
                    if (left >= vectors_together && filled % vectors_together == 0) {
                        if (filled) flush();
                        const int64_t whole = left / vectors_together * vectors_together;
                        sum_row(i, whole, plane_end - i, (C - 1) * S, channel, term, even, odd);
                        i += whole, left -= whole;
                        continue;
                    }
                    // A long run fills up what waits, so that the rest of it can be summed where it lies.
                    const int64_t room = left < 2 * vectors_together ? gathered_values - filled : -filled & (vectors_together - 1);
                    const int64_t count = at_most(left, room);
                    term.fetch(i + ahead + (i + ahead < plane_end ? 0 : (C - 1) * S), (int)divide_up(count, T::width));
                    term.each([&](const Element* from, int tensor) INLINED {
                        copy_run(from, i, count, copies + tensor * apart + filled);
                    });
                    i += count, left -= count, filled += count;
                    if (filled == gathered_values) flush();
                }
            }
            flush();
            even.add(odd);
            values[c - c0] = even.total_value(), products[c - c0] = even.total_product();
        }
    }

    // In whole vectors, unless they end after the tensor: what they carry too much is written over, or not read.
    INLINE void copy_run(const Element* from, int64_t i, int64_t count, Element* to) const {
        if (i + count + T::width > N * C * S) {
            memcpy(to, from + i, count * sizeof(Element));
            return;
        }
        for (int64_t j = 0; j < count; j += T::width) memcpy(to + j, from + i + j, T::width * sizeof(Element));
    }

    // Adds a row to the sums of its even and of its odd vectors; `left` elements of x are read from i on, those after them lie `jump`
    // further on. Rows of a multiple of `vectors_together` may be cut there without a change.
    template <class Term>
    static INLINE void sum_row(
        int64_t i, int64_t count, int64_t left, int64_t jump, Channel<Vector> channel, const Term term, Sums<T>& even_sums,
        Sums<T>& odd_sums) {
        constexpr int64_t width = T::width;
        Sums<T> even = even_sums, odd = odd_sums;
        int64_t j = 0;
        for (; j + vectors_together <= count; j += vectors_together) {
            term.fetch(i + j + ahead + (j + ahead < left ? 0 : jump), vectors_of_block);
            typename Sums<T>::Block block = {even, odd};
            UNROLLED
            for (int64_t vector = 0; vector < vectors_of_block; ++vector)
                block.add(term(i + j + vector * width, channel, Whole{}), channel.mean, vector);
            block.end();
        }
        term.fetch(i + j + ahead + (j + ahead < left ? 0 : jump), (int)divide_up(count - j, width));
        typename Sums<T>::Block block = {even, odd};
        for (; j + width <= count; j += width) block.add(term(i + j, channel, Whole{}), channel.mean, 0);
        if (j < count) {
            const Some rest = {(int)(count - j)};
            block.add(term(i + j, channel, rest), channel.mean, 1);
        }
        block.end();
        even_sums = even, odd_sums = odd;
    }

    template <class Term>
    void sum_columns_of(int64_t c0, int64_t c1, Span span, const Term& term, double* values, double* products) {
        const Table<T> table(channels.table, c0, c1, S, false);
        const int64_t vectors = divide_up(table.places, T::width);
        alignas(cache_line) uint8_t bytes[(most_columns / T::width + 1) * sizeof(Sums<T>)];
        Sums<T>* sums = (Sums<T>*)bytes;
        for (int64_t vector = 0; vector < vectors; ++vector) sums[vector] = {};
        sum_columns(table, rows_of(c0, c1, span), term, sums);
        alignas(cache_line) double columns[2][most_columns + T::width];
        for (int64_t j = 0; j < table.places; j += T::width) sums[j / T::width].unpack(columns[0] + j, columns[1] + j);
        for (int64_t c = 0; c < c1 - c0; ++c) {
            values[c] = total_of(columns[0] + c * S, S);
            products[c] = total_of(columns[1] + c * S, S);
        }
    }

    Rows rows_of(int64_t c0, int64_t c1, Span span) const {
        return {(span.n0 * C + c0) * S, span.n1 - span.n0, C * S, (c1 - c0) * S};
    }

    template <class Map>
    __attribute__((noinline)) void map_span(int64_t c0, int64_t c1, Span span, const Map& map, int64_t next) {
        const Outputs<T, Map::writes_two> out(task);
        if (maps_by_columns) {
            const Table<T> table(channels.table, c0, c1, S, true);
            const Rows rows = rows_of(c0, c1, span);
            const bool aligned = rows.stride * sizeof(Element) % cache_line == 0 && out.to_alignment(rows.first) == 0;
            const int64_t ahead = next ? next : rows_of_map * rows.stride;
            if constexpr (Map::has_mask) return map_masked_columns(table, rows, span.n0, task.stream && aligned, ahead, map, out);
            return task.stream && aligned ? map_columns<true>(table, rows, ahead, map, out)
                                          : map_columns<false>(table, rows, ahead, map, out);
        }
        for (int64_t n = span.n0; n < span.n1; ++n)
            for (int64_t c = c0; c < c1; ++c)
                map_row((n * C + c) * S + span.s0, n * S + span.s0, span.s1 - span.s0, channels.table.of(c), map, next, out);
    }

    // Each row by itself, with the mask of its sample once for each channel.
    template <class Map, class Out>
    void map_masked_columns(
        const Table<T>& table, Rows rows, int64_t n, bool stream, int64_t ahead, const Map& map, const Out& out) const {
        uint8_t* mask = (uint8_t*)malloc(rows.columns + T::width);  // a vector past the end may be loaded, never used
        const int64_t samples = rows.count;
        rows.count = 1;
        for (int64_t sample = 0; sample < samples; ++sample, rows.first += rows.stride) {
            memcpy(mask, task.mask + (n + sample) * S, S);
            for (int64_t have = S; have < rows.columns; have *= 2) memcpy(mask + have, mask, at_most(have, rows.columns - have));
            const Map here = map.under(mask, mask + rows.columns + T::width);
            stream ? map_columns<true>(table, rows, ahead, here, out) : map_columns<false>(table, rows, ahead, here, out);
        }
        free(mask);
    }

    template <class Map, class Out>
    INLINE void map_row(int64_t i, int64_t m, int64_t count, Channel<Vector> channel, const Map map, int64_t next, const Out out) const {
        constexpr int64_t width = T::width;
        const int64_t head = task.stream ? out.to_alignment(i) : -1;
        int64_t j = 0;
        if (head >= 0 && head < count) {
            if (head > 0) out.store(i, map(i, m, channel, Some{(int)head}), Some{(int)head});
            for (j = head; j + width <= count; j += width) {
                map.fetch(i + j + next, 1);
                out.stream(i + j, map(i + j, m + j, channel, Whole{}));
            }
        } else {
            for (; j + width <= count; j += width) {
                map.fetch(i + j + next, 1);
                out.store(i + j, map(i + j, m + j, channel, Whole{}), Whole{});
            }
        }
        if (j < count) {
            const Some rest = {(int)(count - j)};
            out.store(i + j, map(i + j, m + j, channel, rest), rest);
        }
    }
};

}  // namespace
