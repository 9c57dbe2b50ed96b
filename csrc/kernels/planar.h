// Loops over x as (N, C, S): a channel is N rows of S contiguous values, C · S apart.
//
// A thread takes a channel, or a block of channels if planes are small, through both passes, so that the second pass finds x in the
// cache: memory is read once and written once. Blocks also join short rows to long runs (7x7 planes are 196 bytes). If there are too few
// channels for the threads, each channel is cut into chunks that the threads share, and the second pass begins after the first.
//
// The sums are the same in every case: a channel is cut into chunks of at most 64K values, which depend on N and S alone, and the sums of
// the chunks are added in order. Under a mask a chunk holds counted values, see counted_vectors.h.
#pragma once

#include "kernels/counted_vectors.h"

namespace {

constexpr int64_t block_channels = 64;       // their sums, 16 KB on the stack, stay in the first-level cache
constexpr int64_t block_bytes = 512 * 1024;  // of all tensors that both passes read: half of a 1 MB second-level cache
constexpr int64_t most_joined = 512;         // values of a plane
constexpr int64_t most_columns = 4096;
constexpr int64_t prefetch_bytes = 8192;  // how far ahead of the reads to prefetch

// Elements s0 ... s1 - 1 of rows n0 ... n1 - 1.
struct Span {
    int64_t n0, n1, s0, s1;
};

template <class T>
class Planar {
  public:
    typedef typename T::Element Element;
    typedef typename T::Vector Vector;
    typedef void (Planar::*Sum)(int64_t c0, int64_t c1, int64_t chunk, double* values, double* products) const;
    // The loops that are compiled for each kind of call; the rest is compiled once for each storage type.
    struct Loops {
        ColumnLoops<T> columns;  // without a mask
        Sum sum, sum_again;      // as in `columns`
        void (Planar::*map)(int64_t c0, int64_t c1, const Span& span, int64_t next) const;
        void (Planar::*map_joined)(int64_t c0, int64_t c1, const Span& span, bool stream, int64_t ahead) const;  // under a mask
    };

    Planar(Task& task, Loops loops)
        : task(task),
          loops(loops),
          channels(task, 1),
          N(task.N),
          C(task.C),
          S(task.S),
          counted(mask_of_sums(task), N, S, C * S, task.counted),
          from_memory(task.from_memory),
          streams(Simd::streams && task.from_memory) {
        row_values = at_most(S, chunk_values);
        rows = at_most(at_least(chunk_values / at_least(S, 1), 1), at_least(N, 1));
        chunks_of_row = divide_up(S, row_values);
        chunks = task.mask ? counted.portions.chunks : divide_up(N, rows) * chunks_of_row;
        const bool many_rows = N >= vectors_of_block, short_rows = many_rows && S < short_plane(task);
        sums_by_columns = short_rows && !task.mask;
        // Stores that bypass the cache are fast only for whole cache lines, and the ends of short rows are not whole lines.
        maps_by_columns = short_rows || S < T::width || (many_rows && streams && S < most_joined && S * sizeof(Element) % cache_line);
    }

    // Runs both passes over each block of channels.
    void fused() {
        const int64_t block = channels_per_task(tensors_of_both(task)), tasks = divide_up(C, block);
        if (too_few(tasks)) {
            reduce_split();
            return map_in_order();
        }
        parallel(task.threads, tasks, [&](int64_t number) {
            const int64_t c0 = number * block, c1 = at_most(c0 + block, C);
            const int64_t next = from_memory && number + 1 < tasks ? block * S : 0;
            reduce_block(c0, c1);
            map_span(c0, c1, {0, N, 0, S}, next);
            if (streams) Simd::flush();
        });
    }

    void reduce() {
        const int64_t block = channels_per_task(tensors_of_both(task)), tasks = divide_up(C, block);
        if (too_few(tasks)) return reduce_split();
        parallel(task.threads, tasks, [&](int64_t number) { reduce_block(number * block, at_most((number + 1) * block, C)); });
    }

    void map() {
        channels.set_all();
        map_in_order();
    }

    // Computes the sums of one chunk of channels c0 ... c1 - 1.
    template <class Term>
    void sum_rows(int64_t c0, int64_t c1, int64_t number, double* values, double* products) const {
        const Term term = Term::of(task);
        const Span span = chunk(number);
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

    // The same under a mask: sums each portion in all channels before the next portion, in the order of memory.
    template <class Term>
    void sum_counted(int64_t c0, int64_t c1, int64_t number, double* values, double* products) const {
        const Term term = Term::of(task);
        Sums<T> sums[block_channels];
        const int64_t rows_together = counted.rows_together, samples_ahead = rows_together * C * S, block = (c1 - c0) * S;
        const int64_t near = ahead / rows_together;
        for (auto portion = counted.portions.begin(number); portion < counted.portions.end(number); ++portion)
            for (int64_t c = c0; c < c1; ++c) {
                const int64_t first = (portion->row * C + c) * S;
                // Positions that do not count are prefetched too: the map will read them, and contiguous reads are faster (14x14 planes
                // took 6.5 ns a line without this, 3.2 ns with it).
                for (int64_t row = 0; row < portion->rows; ++row)
                    for (int64_t s = portion->begin; s < portion->end; s += T::width) {
                        const bool stays = (c - c0) * S + s + near < block;
                        term.prefetch(first + row * C * S + s + near + (stays ? 0 : samples_ahead - block), 1);
                    }
                sums[c - c0] = add_vectors(*portion, first, channels.table.of(c), term, sums[c - c0]);
            }
        for (int64_t c = 0; c < c1 - c0; ++c) values[c] = sums[c].total_value(), products[c] = sums[c].total_product();
    }

    template <class Map>
    void map_rows(int64_t c0, int64_t c1, const Span& span, int64_t next) const {
        const Map map = Map::of(task);
        const Outputs<T, Map::writes_two> out(task);
        for (int64_t n = span.n0; n < span.n1; ++n)
            for (int64_t c = c0; c < c1; ++c)
                map_row((n * C + c) * S + span.s0, n * S + span.s0, span.s1 - span.s0, channels.table.of(c), map, next, out);
    }

    // Maps short planes under a mask, in whole vectors that may span several channels. As columns, each vector would load the numbers and
    // the mask of its columns from memory: 14x14 planes took 1.8 times as long as without a mask; in this loop they take the same time.
    template <class Map>
    void map_joined(int64_t c0, int64_t c1, const Span& span, bool stream, int64_t ahead) const {
        uint8_t mask[most_joined + T::width];
        const Map here = Map::of(task).under(mask, mask + sizeof mask);
        const Outputs<T, Map::writes_two> out(task);
        for (int64_t n = span.n0; n < span.n1; ++n) {
            memcpy(mask, task.mask + n * S, S);
            for (int64_t have = S; have < S + T::width; have *= 2) memcpy(mask + have, mask, at_most(have, S + T::width - have));
            int64_t s = 0;
            for (int64_t c = c0; c < c1; ++c, s -= S) {
                const int64_t plane = (n * C + c) * S;
                Channel<Vector> channel = channels.table.of(c);
                for (; s < S; s += T::width) {
                    int64_t known = S - s;
                    for (int64_t other = c + 1; known < T::width && other < c1; ++other, known += S)
                        channel = joined(channel, channels.table.of(other), Partial{(int)known});
                    if (known < T::width) {
                        map_partial(plane + s, s, channel, Partial{(int)known}, here, out);
                        continue;
                    }
                    here.prefetch(plane + s + ahead, 1);
                    const Places<1> i = {{plane + s}}, m = {{s}};
                    stream ? map_whole<true>(i, m, channel, here, out) : map_whole<false>(i, m, channel, here, out);
                }
            }
        }
    }

  private:
    // In values; blocks of shorter planes are processed as columns. With AVX2 the loops over rows take 8x8 and 10x10 planes of float32 in 1.1
    // to 1.4 times less, of half precision in 1.1 to 1.6 times more. A map of large x alone gains from 7x7 on, up to 1.3 times.
    static int64_t short_plane(const Task& task) {
        if (vector_bytes != 32 || sizeof(Element) != sizeof(float)) return 128;
        return task.verb == Verb::normalize && task.from_memory ? 49 : 64;
    }
    static constexpr int64_t ahead = prefetch_bytes / sizeof(Element);

    Task& task;
    const Loops loops;
    Channels<T> channels;
    const int64_t N, C, S;
    const CountedVectors<T> counted;
    int64_t rows, row_values, chunks_of_row, chunks;
    bool sums_by_columns, maps_by_columns;
    // Whether x exceeds the last-level cache; then the next block is prefetched while one is mapped. A smaller x needs no prefetching, and
    // its blocks may be larger, which makes longer runs.
    const bool from_memory;
    const bool streams;  // whether a map writes around the cache

    // A map without sums runs in the order of memory.
    void map_in_order() const {
        const int64_t in_order = at_most(at_least(chunk_values / at_least(S, 1), 1), C);
        const int64_t block = maps_by_columns ? channels_per_task(1) : in_order, blocks = divide_up(C, block);
        const int64_t samples = maps_by_columns ? rows : blocks > 1 ? 1 : at_least(chunk_values / (C * S), 1);
        const int64_t pieces = divide_up(N, samples);
        parallel(task.threads, pieces * blocks * chunks_of_row, [&](int64_t number) {
            const int64_t s = number % chunks_of_row, rest = number / chunks_of_row;
            const int64_t c0 = rest % blocks * block, n0 = rest / blocks * samples;
            const Span span = {n0, at_most(n0 + samples, N), s * row_values, at_most((s + 1) * row_values, S)};
            map_span(c0, at_most(c0 + block, C), span, 0);
            if (streams) Simd::flush();
        });
    }

    // A typical value of the channel, taken from the quarters of its first row.
    double typical(int64_t c) const {
        if (task.mask) {
            if (!task.counted) return 0.0;
            const auto& portion = *counted.portions.begin(0);
            const auto& vector = *counted.begin(portion);
            return value(portion.row, c, vector.at + vector.lanes.begin);
        }
        return Channels<T>::middle(value(0, c, 0), value(0, c, S / 4), value(0, c, S / 2), value(0, c, S / 4 * 3));
    }

    NOINLINE double value(int64_t n, int64_t c, int64_t s) const { return T::load_one((const Element*)task.x + (n * C + c) * S + s); }

    int64_t channels_per_task(int tensors) const {
        const int64_t channel_bytes = at_least(N * S * (int64_t)sizeof(Element) * tensors, 1);
        const int64_t bytes = from_memory ? block_bytes : 2 * block_bytes;
        const int64_t cached = at_least(bytes / channel_bytes, 1), shared = divide_up(C, 4 * (int64_t)task.threads);
        const int64_t block = at_most(at_most(cached, shared), block_channels);
        if (!maps_by_columns) return block;
        const int64_t plane = S * sizeof(Element), odd = plane & -plane, lines = at_least(cache_line / odd, 1);
        return at_least(at_most(block, most_columns / S) / lines * lines, lines);  // whole cache lines
    }

    // Whether there are too few blocks of channels for the threads, and the channels can be cut.
    bool too_few(int64_t tasks) const { return task.threads > 1 && !is_balanced(task.threads, tasks) && chunks > 1; }

    Span chunk(int64_t number) const {
        const int64_t n0 = number / chunks_of_row * rows, s0 = number % chunks_of_row * row_values;
        return {n0, at_most(n0 + rows, N), s0, at_most(s0 + row_values, S)};
    }

    void reduce_block(int64_t c0, int64_t c1) {
        double values[block_channels], products[block_channels];
        channels.begin(c0, c1, [&](int64_t c) { return typical(c); });
        sum_chunks(c0, c1, false, values, products);
        if (!channels.finish(c0, c1, values, products, false)) return;
        for (int64_t c = c0; c < c1; ++c) {
            if (!channels.is_unfinished(c)) continue;
            sum_chunks(c, c + 1, true, values, products);
            channels.finish(c, c + 1, values, products, true);
        }
    }

    void sum_chunks(int64_t c0, int64_t c1, bool again, double* values, double* products) const {
        double value[block_channels], product[block_channels];
        for (int64_t c = 0; c < c1 - c0; ++c) values[c] = products[c] = 0.0;
        for (int64_t number = 0; number < chunks; ++number) {
            sum_chunk(c0, c1, number, again, value, product);
            for (int64_t c = 0; c < c1 - c0; ++c) values[c] += value[c], products[c] += product[c];
        }
    }

    NOINLINE void sum_chunk(int64_t c0, int64_t c1, int64_t number, bool again, double* values, double* products) const {
        if (!sums_by_columns) return (this->*(again ? loops.sum_again : loops.sum))(c0, c1, number, values, products);
        const Table<T> table(channels.table, c0, c1, S, false);
        const int64_t vectors = divide_up(table.places, T::width);
        alignas(cache_line) uint8_t bytes[(most_columns / T::width + 1) * sizeof(Sums<T>)];
        Sums<T>* sums = (Sums<T>*)bytes;
        for (int64_t vector = 0; vector < vectors; ++vector) sums[vector] = {};
        (again ? loops.columns.sum_again : loops.columns.sum)(task, table, rows_of(c0, c1, chunk(number)), {}, sums);
        alignas(cache_line) double columns[2][most_columns + T::width];
        for (int64_t j = 0; j < table.places; j += T::width) sums[j / T::width].unpack(columns[0] + j, columns[1] + j);
        for (int64_t c = 0; c < c1 - c0; ++c) {
            values[c] = total_of(columns[0] + c * S, S);
            products[c] = total_of(columns[1] + c * S, S);
        }
    }

    // Computes the sums of the chunks on all threads, then adds them in the order of `sum_chunks`.
    void reduce_split() {
        double* sums = (double*)malloc(2 * C * (chunks + 1) * sizeof(double));
        double *values = sums + 2 * C * chunks, *products = values + C;
        channels.begin(0, C, [&](int64_t c) { return typical(c); });
        const auto sum_all = [&](bool again) {
            parallel(task.threads, C * chunks, [&](int64_t number) {
                const int64_t c = number / chunks;
                if (again && !channels.is_unfinished(c)) return;
                sum_chunk(c, c + 1, number % chunks, again, sums + 2 * number, sums + 2 * number + 1);
            });
            for (int64_t c = 0; c < C; ++c) {
                values[c] = products[c] = 0.0;
                for (int64_t number = c * chunks; number < (c + 1) * chunks; ++number)
                    values[c] += sums[2 * number], products[c] += sums[2 * number + 1];
            }
        };
        sum_all(false);
        if (channels.finish(0, C, values, products, false)) {
            sum_all(true);
            for (int64_t c = 0; c < C; ++c)
                if (channels.is_unfinished(c)) channels.finish(c, c + 1, values + c, products + c, true);
        }
        free(sums);
    }

    template <class Term>
    INLINE Sums<T> add_vectors(const typename CountedVectors<T>::Portion& portion, int64_t first, Channel<Vector> channel, const Term term,
                               Sums<T> sums) const {
        const auto add = [&](int64_t i, auto lanes) INLINED {
            typename Term::Block block = {sums, sums};
            add_to(block, i, channel, term, 0, lanes);
            block.flush();
        };
        for (auto vectors = counted.begin(portion); vectors < counted.end(portion); ++vectors) {
            int64_t i = first + vectors->at;
            add(i, vectors->lanes);
            for (const int64_t end = i + vectors->whole * T::width; i < end;) add(i += T::width, Whole{});
        }
        return sums;
    }

    // Adds a row to the sums of its even and of its odd vectors. For prefetching: `left` elements from i on are contiguous, and the next
    // elements to read begin `jump` elements later.
    template <class Term>
    static INLINE void sum_row(int64_t i, int64_t count, int64_t left, int64_t jump, Channel<Vector> channel, const Term term,
                               Sums<T>& even_sums, Sums<T>& odd_sums) {
        constexpr int64_t width = T::width;
        Sums<T> even = even_sums, odd = odd_sums;
        int64_t j = 0;
        for (; j + vectors_of_block * width <= count; j += vectors_of_block * width) {
            term.prefetch(i + j + ahead + (j + ahead < left ? 0 : jump), vectors_of_block);
            typename Term::Block block = {even, odd};
            add_all_to(block, i + j, width, channel, term);
            block.flush();
        }
        term.prefetch(i + j + ahead + (j + ahead < left ? 0 : jump), (int)divide_up(count - j, width));
        typename Term::Block block = {even, odd};
        for (; j + width <= count; j += width) add_to(block, i + j, channel, term, 0, Whole{});
        if (j < count) {
            const Partial rest = {(int)(count - j)};
            add_to(block, i + j, channel, term, 1, rest);
        }
        block.flush();
        even_sums = even, odd_sums = odd;
    }

    Rows rows_of(int64_t c0, int64_t c1, const Span& span) const {
        return {(span.n0 * C + c0) * S, span.n1 - span.n0, C * S, (c1 - c0) * S};
    }

    void map_span(int64_t c0, int64_t c1, const Span& span, int64_t next) const {
        if (!maps_by_columns) return (this->*loops.map)(c0, c1, span, next);
        const Rows rows = rows_of(c0, c1, span);
        const bool aligned = rows.stride * sizeof(Element) % cache_line == 0 && Outputs<T, true>(task).to_alignment(rows.first) == 0;
        const int64_t ahead = next ? next : rows_of_map * rows.stride;
        if (task.mask) return (this->*loops.map_joined)(c0, c1, span, streams && aligned, ahead);
        loops.columns.map(task, Table<T>(channels.table, c0, c1, S, !goes_forward(task)), rows, streams && aligned, ahead);
    }

    // If a row is not whole vectors, its last vector overlaps the one before it. When streaming, the first vector overlaps the second
    // instead, so that the others are aligned. A map may write an element twice.
    template <class Map, class Out>
    INLINE void map_row(int64_t i, int64_t m, int64_t count, Channel<Vector> channel, const Map map, int64_t next, const Out out) const {
        constexpr int64_t width = T::width;
        if (count < width) return map_partial(i, m, channel, Partial{(int)count}, map, out);
        const int64_t head = streams ? out.to_alignment(i) : -1, last = count - width;
        int64_t j = 0, step = width;
        if (head >= 0 && head <= last) {
            for (j = head; j <= last; j += width) map_vector<true>(i + j, m + j, channel, next, map, out);
            step = last;
            if (head == 0 && j == count) return;
            j = head ? 0 : last;
        } else if constexpr (Map::unrolled > 1) {
            for (; j + Map::unrolled * width <= count; j += Map::unrolled * width) {
                map.prefetch(i + j + next, Map::unrolled);
                UNROLLED
                for (int64_t k = j; k < j + Map::unrolled * width; k += Map::together * width)
                    map_whole<false>(consecutive<Map::together>(i + k, width), consecutive<Map::together>(m + k, width), channel, map, out);
            }
            if (j == count) return;
            j = at_most(j, last);
        }
        for (;; j = at_most(j + step, last)) {
            map_vector<false>(i + j, m + j, channel, next, map, out);
            if (j >= last) break;
        }
    }

    template <bool stream, class Map, class Out>
    static INLINE void map_vector(int64_t i, int64_t m, const Channel<Vector>& channel, int64_t ahead, const Map& map, const Out& out) {
        map.prefetch(i + ahead, 1);
        map_whole<stream>(Places<1>{{i}}, Places<1>{{m}}, channel, map, out);
    }
};

}  // namespace
