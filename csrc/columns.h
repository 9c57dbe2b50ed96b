// Tensors as rows of columns: every column belongs to one channel, whose numbers stand in a table at the column's place. That is how an
// interleaved tensor lies, and how short planes are taken: a block of channels is B · S columns, a sample is a row.
//
// Eight rows share one load of the numbers, and one trip of their sums to memory and back.
#pragma once

#include "elements.h"

namespace {

constexpr int64_t rows_of_map = 2;
constexpr int64_t tile_columns = 1024;  // whose numbers and sums stay in the first-level cache

// Rows of `columns` elements; the first begins at element `first` of x, each `stride` after the one before.
struct Rows {
    int64_t first, count, stride, columns;
};

// body(j0, j1) for each tile of columns.
template <class Body>
INLINE void for_tiles(int64_t columns, const Body& body) {
    for (int64_t j = 0; j < columns; j += tile_columns) body(j, at_most(j + tile_columns, columns));
}

// body(j, Whole) for each vector of a row, body(j, Some) for what is left.
template <class T, class Body>
INLINE void for_columns(int64_t j, int64_t columns, const Body& body) {
    for (; j + T::width <= columns; j += T::width) body(j, Whole{});
    if (j < columns) body(j, Some{(int)(columns - j)});
}

// Adds `count` rows, at most `vectors_of_block`, to the sums of their columns.
template <class T, class Term>
INLINE void sum_together(
    const Table<T>& table, const Rows& rows, int64_t j0, int64_t j1, int64_t count, const Term& term, Sums<T>* sums) {
    for_columns<T>(j0, j1, [&](int64_t j, auto part) INLINED {
        const Channel<typename T::Vector> channel = table.from(j);
        Sums<T> here = sums[j / T::width];
        int64_t i = rows.first + j;
        if (count == vectors_of_block) {
            UNROLLED
            for (int64_t row = 0; row < vectors_of_block; ++row) term.fetch(i + (vectors_of_block + row) * rows.stride, 1);
        }
        typename Sums<T>::Block block = {here, here};
        UNROLLED
        for (int64_t row = 0; row < count; ++row, i += rows.stride) block.add(term(i, channel, part), channel.mean, row);
        block.end();
        sums[j / T::width] = here;
    });
}

// Adds the rows to the sums of their columns, of which a vector of `sums` has one a lane.
template <class T, class Term>
INLINE void sum_columns(const Table<T>& table, const Rows& all, const Term term, Sums<T>* sums) {
    for_tiles(all.columns, [&](int64_t j0, int64_t j1) INLINED {
        Rows rows = all;
        for (; rows.count >= vectors_of_block; rows.count -= vectors_of_block, rows.first += vectors_of_block * rows.stride)
            sum_together(table, rows, j0, j1, vectors_of_block, term, sums);
        if (rows.count > 0) sum_together(table, rows, j0, j1, rows.count, term, sums);
    });
}

// Maps `count` rows, at most `rows_of_map`; what lies `ahead` of each element is asked for. A mask is one of the columns, the same for
// all rows.
template <bool stream, class T, class Map, class Out>
INLINE void map_together(
    const Table<T>& table, const Rows& rows, int64_t j0, int64_t j1, int64_t count, int64_t ahead, const Map& map, const Out& out) {
    for_columns<T>(j0, j1, [&](int64_t j, auto part) INLINED {
        const Channel<typename T::Vector> channel = table.from(j);
        int64_t i = rows.first + j;
        if (count == rows_of_map) {
            UNROLLED
            for (int64_t row = 0; row < rows_of_map; ++row) map.fetch(i + row * rows.stride + ahead, 1);
        }
        UNROLLED
        for (int64_t row = 0; row < count; ++row, i += rows.stride) {
            const auto values = map(i, j, channel, part);
            if constexpr (stream && decltype(part)::is_whole) {
                out.stream(i, values);
            } else {
                out.store(i, values, part);
            }
        }
    });
}

template <bool stream, class T, class Map, class Out>
INLINE void map_columns(const Table<T>& table, const Rows& all, int64_t ahead, const Map map, const Out out) {
    for_tiles(all.columns, [&](int64_t j0, int64_t j1) INLINED {
        Rows rows = all;
        for (; rows.count >= rows_of_map; rows.count -= rows_of_map, rows.first += rows_of_map * rows.stride)
            map_together<stream>(table, rows, j0, j1, rows_of_map, ahead, map, out);
        if (rows.count > 0) map_together<stream>(table, rows, j0, j1, rows.count, ahead, map, out);
    });
}

}  // namespace
