// x as (N, C, S): a channel is N rows of S neighbors, C · S apart.
//
// A task takes a channel, or a block of channels when planes are small, through both passes, so that the second one finds x in the
// cache: one read and one write of memory. The blocks also make long runs of short rows (7x7 planes are 196 bytes). When there
// are too few channels for the threads, the channel itself is cut instead, and the passes are apart.
//
// Sums are the same in every case: a channel is cut into chunks of at most 64K values, by N and S alone, which are added in order.
#pragma once

#include "elements.h"

namespace {

constexpr int64_t chunk_values = 1 << 16;
constexpr int64_t block_channels = 64;       // their sums, 16 KB on the stack, stay in the first-level cache
constexpr int64_t block_bytes = 512 * 1024;  // of all tensors that both passes read: half of a 1 MB second-level cache
constexpr int64_t staged_row_bytes = 1024;   // shorter rows are gathered before they are written around the cache
constexpr int64_t stage_bytes = 16 * 1024;

// Rows n0 ... n1 - 1 and in each the elements s0 ... s1 - 1.
struct Span {
    int64_t n0, n1, s0, s1;
};

// Gathers short rows into whole cache lines: a line that is only partly written around the cache is read first after all.
template <class T>
class Stage {
  public:
    typedef typename T::Element Element;

    // The place to write what belongs at `target`: as far from a cache line's start as that.
    Element* begin(Element* target, int64_t elements) {
        this->target = (uint8_t*)target;
        size = elements * sizeof(Element);
        staged = bytes + (uint64_t)target % cache_line;
        return (Element*)staged;
    }
    void flush() {
        int64_t at = at_most((cache_line - (uint64_t)target % cache_line) % cache_line, size);
        memcpy(target, staged, at);
        for (; at + vector_bytes <= size; at += vector_bytes)
            stream_vector(target + at, load_vector<Floats>(staged + at));
        memcpy(target + at, staged + at, size - at);
    }

  private:
    alignas(cache_line) uint8_t bytes[stage_bytes + cache_line];
    uint8_t *target, *staged;
    int64_t size;
};

template <class T>
class Planar {
  public:
    typedef typename T::Real Real;
    typedef typename T::Element Element;
    typedef typename T::Vector Vector;

    explicit Planar(Task& task) : task(task), channels(task, 1), N(task.N), C(task.C), S(task.S) {
        row_values = at_most(S, chunk_values);
        rows = at_most(at_least(chunk_values / at_least(S, 1), 1), at_least(N, 1));
        chunks_of_row = divide_up(S, row_values);
        chunks = divide_up(N, rows) * chunks_of_row;
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
            reduce_block(c0, c1, term);
            map_span(c0, c1, {0, N, 0, S}, map);
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
    int64_t rows, row_values, chunks_of_row, chunks;

    // A map alone runs through memory as it lies.
    template <class Map>
    void map_in_order(const Map& map) {
        const int64_t block = at_most(at_least(chunk_values / at_least(S, 1), 1), C), blocks = divide_up(C, block);
        const int64_t samples = blocks > 1 ? 1 : at_least(chunk_values / (C * S), 1);
        const int64_t pieces = divide_up(N, samples);
        parallel(task.threads, pieces * blocks * chunks_of_row, [&](int64_t number) {
            const int64_t s = number % chunks_of_row, rest = number / chunks_of_row;
            const int64_t c0 = rest % blocks * block, n0 = rest / blocks * samples;
            map_span(c0, at_most(c0 + block, C),
                     {n0, at_most(n0 + samples, N), s * row_values, at_most((s + 1) * row_values, S)}, map);
            if (task.stream) end_streaming();
        });
    }

    // A typical value of the channel, from its first row: the quarters of it.
    double typical(int64_t c) const {
        if (task.mask) {
            int64_t m = 0;
            while (m < N * S && !task.mask[m]) ++m;
            return m < N * S ? value(m / S, c, m % S) : 0.0;
        }
        return Channels<T>::middle(value(0, c, 0), value(0, c, S / 4), value(0, c, S / 2), value(0, c, S / 4 * 3));
    }

    double value(int64_t n, int64_t c, int64_t s) const {
        return (double)T::load((const Element*)task.x + (n * C + c) * S + s, Some{1})[0];
    }

    int64_t channels_per_task(int tensors) const {
        const int64_t channel_bytes = at_least(N * S * (int64_t)sizeof(Element) * tensors, 1);
        const int64_t cached = at_least(block_bytes / channel_bytes, 1), shared = divide_up(C, 4 * (int64_t)task.threads);
        return at_most(at_most(cached, shared), block_channels);
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
        for (int64_t c = c0; c < c1; ++c) channels.begin(c, typical(c));
        sum_chunks(c0, c1, term, values, products);
        for (int64_t c = c0; c < c1; ++c) {
            if (channels.finish(c, values[c - c0], products[c - c0], false)) continue;
            sum_chunks(c, c + 1, term, values, products);
            channels.finish(c, values[0], products[0], true);
        }
    }

    template <class Term>
    void sum_chunks(int64_t c0, int64_t c1, const Term& term, double* values, double* products) {
        double value[block_channels], product[block_channels];
        for (int64_t c = 0; c < c1 - c0; ++c) values[c] = products[c] = 0.0;
        for (int64_t number = 0; number < chunks; ++number) {
            sum_chunk(c0, c1, chunk(number), term, value, product);
            for (int64_t c = 0; c < c1 - c0; ++c) values[c] += value[c], products[c] += product[c];
        }
    }

    // Chunk by chunk on all threads, then the same additions in the same order as in `sum_chunks`.
    template <class Term>
    void reduce_split(const Term& term) {
        double* sums = (double*)malloc(2 * C * chunks * sizeof(double));
        bool* open = (bool*)malloc(C);
        for (int64_t c = 0; c < C; ++c) channels.begin(c, typical(c)), open[c] = true;
        bool more = true;
        for (bool last = false; more; last = true) {
            more = false;
            parallel(task.threads, C * chunks, [&](int64_t number) {
                const int64_t c = number / chunks;
                if (open[c]) sum_chunk(c, c + 1, chunk(number % chunks), term, sums + 2 * number, sums + 2 * number + 1);
            });
            for (int64_t c = 0; c < C; ++c) {
                double value = 0.0, product = 0.0;
                for (int64_t number = c * chunks; number < (c + 1) * chunks; ++number)
                    value += sums[2 * number], product += sums[2 * number + 1];
                if (open[c]) open[c] = !channels.finish(c, value, product, last);
                more |= open[c];
            }
        }
        free(open);
        free(sums);
    }

    // The sums of one chunk of channels c0 ... c1 - 1.
    template <class Term>
    __attribute__((noinline)) void sum_chunk(
        int64_t c0, int64_t c1, Span span, const Term& term, double* values, double* products) {
        Sums<T> sums[block_channels];
        for (int64_t n = span.n0; n < span.n1; ++n)
            for (int64_t c = c0; c < c1; ++c)
                sum_row((n * C + c) * S + span.s0, n * S + span.s0, span.s1 - span.s0, channels.of(c), term, sums[c - c0]);
        for (int64_t c = 0; c < c1 - c0; ++c) values[c] = sums[c].total_value(), products[c] = sums[c].total_product();
    }

    // Two sums of each kind hide the latency of the addition.
    template <class Term>
    static INLINE void sum_row(
        int64_t i, int64_t m, int64_t count, Channel<Vector> channel, const Term& term, Sums<T>& sums) {
        constexpr int64_t width = T::width;
        Sums<T> even = sums, odd;
        int64_t j = 0;
        for (; j + 2 * width <= count; j += 2 * width) {
            even.add(term(i + j, m + j, channel, Whole{}), channel.mean);
            odd.add(term(i + j + width, m + j + width, channel, Whole{}), channel.mean);
        }
        for (; j < count; j += width) {
            const Some part = {(int)at_most(width, count - j)};
            even.add(term(i + j, m + j, channel, part), channel.mean);
        }
        even.add(odd);
        sums = even;
    }

    template <class Map>
    __attribute__((noinline)) void map_span(int64_t c0, int64_t c1, Span span, const Map& map) {
        const Outputs<T> out = {(Element*)task.output, (Element*)task.dresidual};
        const int64_t row_bytes = S * sizeof(Element), width = span.s1 - span.s0;
        if (task.stream && row_bytes < staged_row_bytes && c1 - c0 > 1) return map_staged(c0, c1, span, map, out);
        for (int64_t n = span.n0; n < span.n1; ++n)
            for (int64_t c = c0; c < c1; ++c) {
                const int64_t i = (n * C + c) * S + span.s0;
                map_row(i, n * S + span.s0, width, channels.of(c), map, out.moved(i), task.stream);
            }
    }

    template <class Map>
    void map_staged(int64_t c0, int64_t c1, Span span, const Map& map, Outputs<T> out) {
        Stage<T> first, second;
        const int64_t group = at_least(stage_bytes / (S * (int64_t)sizeof(Element)), 1);
        for (int64_t n = span.n0; n < span.n1; ++n)
            for (int64_t from = c0; from < c1; from += group) {
                const int64_t to = at_most(from + group, c1), start = (n * C + from) * S, size = (to - from) * S;
                const Outputs<T> staged = {out.first ? first.begin(out.first + start, size) : nullptr,
                                           out.second ? second.begin(out.second + start, size) : nullptr};
                for (int64_t c = from; c < to; ++c)
                    map_row((n * C + c) * S, n * S, S, channels.of(c), map, staged.moved((c - from) * S), false);
                if (out.first) first.flush();
                if (out.second) second.flush();
            }
    }

    // `out` begins where the row does.
    template <class Map>
    static INLINE void map_row(
        int64_t i, int64_t m, int64_t count, Channel<Vector> channel, const Map& map, Outputs<T> out, bool stream) {
        constexpr int64_t width = T::width;
        int64_t j = 0;
        const int64_t head = stream ? out.to_alignment() : -1;
        if (head >= 0 && head < count) {
            if (head > 0) out.store(0, map(i, m, channel, Some{(int)head}), Some{(int)head});
            for (j = head; j + width <= count; j += width) out.stream(j, map(i + j, m + j, channel, Whole{}));
        } else {
            for (; j + width <= count; j += width) out.store(j, map(i + j, m + j, channel, Whole{}), Whole{});
        }
        if (j < count) {
            const Some rest = {(int)(count - j)};
            out.store(j, map(i + j, m + j, channel, rest), rest);
        }
    }
};

}  // namespace
