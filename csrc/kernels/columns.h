// Loops over tensors seen as rows of columns. Every column belongs to one channel; a table holds the channel's numbers at the column's
// place. An interleaved tensor has this layout. Planar tensors with short planes are seen so too: a sample is a row, and a block of B
// channels is B · S columns.
//
// The numbers of a vector of columns are loaded, and its sums loaded and stored, once for eight rows; by a map once for four.
#pragma once

#include "kernels/elements.h"

namespace {

constexpr int64_t rows_of_map = 4;
static_assert(rows_of_map % activated_together == 0 && vectors_of_block % activated_together == 0, "whole fours");
constexpr int64_t vectors_of_row = 4;       // together, where a map takes one row
constexpr int64_t most_in_fours = 1 << 21;  // values of a tensor; of a larger one a map takes one row, if it can
constexpr int64_t tile_columns = 1024;      // their numbers and sums stay in the first-level cache

// `count` rows of `columns` elements; the first begins at element `first` of x, each next one `stride` elements later.
struct Rows {
    int64_t first, count, stride, columns;
};

// Adds `count` rows, at most `vectors_of_block`, to the sums of the columns of one vector.
template <class T, class Term, class Lanes>
INLINE void sum_rows(const Table<T>& table, const Rows& rows, int64_t j, int64_t count, const Term& term, Lanes lanes, Sums<T>* sums) {
    const Channel<typename T::Vector> channel = table.from(j);
    Sums<T> here = sums[j / T::width];
    typename Term::Block block = {here, here};
    for (int64_t row = 0; row < count; ++row) add_to(block, rows.first + j + row * rows.stride, channel, term, 0, lanes);
    block.flush();
    sums[j / T::width] = here;
}

// The same for `vectors_of_block` rows and a whole vector; prefetches the rows after them.
template <class T, class Term>
INLINE void sum_block_of_rows(const Table<T>& table, const Rows& rows, int64_t j, const Term& term, Sums<T>* sums) {
    const Channel<typename T::Vector> channel = table.from(j);
    Sums<T> here = sums[j / T::width];
    typename Term::Block block = {here, here};
    const int64_t i = rows.first + j;
    UNROLLED
    for (int64_t row = 0; row < vectors_of_block; ++row) term.prefetch(i + (vectors_of_block + row) * rows.stride, 1);
    add_all_to(block, i, rows.stride, channel, term);
    block.flush();
    sums[j / T::width] = here;
}

// Adds the rows to the sums of their columns: each lane of `sums` belongs to a column. If there are `copies`, rows are read from them.
template <class T, class Term>
void sum_columns(const Task& task, const Table<T>& table, const Rows& all, const Copies<T>& copies, Sums<T>* sums) {
    const Term term = Term::of(task, copies);
    for (int64_t j0 = 0; j0 < all.columns; j0 += tile_columns) {
        const int64_t j1 = at_most(j0 + tile_columns, all.columns);
        Rows rows = all;
        while (rows.count > 0) {
            const int64_t count = at_most(rows.count, vectors_of_block);
            int64_t j = j0;
            if (count == vectors_of_block) {
                for (; j + T::width <= j1; j += T::width) sum_block_of_rows(table, rows, j, term, sums);
            } else {
                for (; j + T::width <= j1; j += T::width) sum_rows(table, rows, j, count, term, Whole{}, sums);
            }
            if (j < j1) sum_rows(table, rows, j, count, term, Partial{(int)(j1 - j)}, sums);
            rows.count -= count, rows.first += count * rows.stride;
        }
    }
}

// Maps `vectors` vectors of each row from column `j` on, and prefetches `ahead` elements ahead. `first` has each row's first element.
template <bool stream, int64_t vectors, int64_t rows, class T, class Map, class Out>
INLINE void map_tile(const Table<T>& table, const int64_t (&first)[rows], int64_t j, int64_t ahead, const Map& map, const Out& out) {
    UNROLLED
    for (int64_t row = 0; row < rows; ++row) map.prefetch(first[row] + j + ahead, vectors);
    UNROLLED
    for (int64_t column = j; column < j + vectors * T::width; column += T::width) {
        const Channel<typename T::Vector> channel = table.from(column);
        UNROLLED
        for (int64_t row = 0; row < rows; row += Map::together) {
            Places<Map::together> i;
            UNROLLED
            for (int number = 0; number < Map::together; ++number) i.at[number] = first[row + number] + column;
            map_whole<stream>(i, i, channel, map, out);
        }
    }
}

// Maps columns `begin` ... `end` - 1. If they are not whole vectors, the last vector overlaps the one before it: a map may write an element
// twice, and maps the last row again if the number of rows is no multiple of `rows_of_map`.
//
// Rows that are mapped together lie far apart, each in a run of rows of its own: the processor foresees long runs, but not neighboring rows
// that take turns (from the last-level cache those took 1.1 to 1.9 times as long). Four rows of half the vectors take no longer than of
// all, in less code.
//
// With `rows` of 1 each vector loads its numbers: in the second-level cache that takes up to 1.2 times as long. But AVX2 then writes both
// halves of a line one after the other, in the order of memory: beyond that cache it takes 0.65 to 0.95 of the time of four rows. Only
// where a row is longer than a tile, the processor does not foresee the next one. Columns of planar tensors gain nothing.
template <bool stream, int64_t rows, class T, class Map, class Out>
NOINLINE void map_whole_columns(const Table<T>& table, const Rows& all, int64_t begin, int64_t end, int64_t ahead_of_rows, const Map& given,
                                const Out& given_out) {
    const Map map = given;
    const Out out = given_out;
    constexpr int64_t vectors = rows == 1 ? vectors_of_row : at_least(Map::unrolled / 2, 1), together = vectors * T::width;
    const int64_t run = divide_up(all.count, rows);
    const int64_t of_row = all.columns > tile_columns ? all.stride : 0, ahead = rows == 1 ? of_row : ahead_of_rows;
    for (int64_t j0 = begin; j0 < end; j0 += tile_columns) {
        const int64_t j1 = at_most(j0 + tile_columns, end), last = j1 - T::width;
        for (int64_t of_run = 0; of_run < run; ++of_run) {
            int64_t first[rows];
            UNROLLED
            for (int64_t row = 0; row < rows; ++row) first[row] = all.first + at_most(row * run + of_run, all.count - 1) * all.stride;
            int64_t j = at_most(j0, last);
            for (; j + together <= j1; j += together) map_tile<stream, vectors>(table, first, j, ahead, map, out);
            for (; j < j1; j += T::width) map_tile<stream, 1>(table, first, at_most(j, last), ahead, map, out);
        }
    }
}

// Maps rows. With `stream`, whole vectors are written around the cache; every row must then begin at an aligned address.
template <class T, class Map>
void map_columns(const Task& task, const Table<T>& table, const Rows& rows, bool stream, int64_t ahead) {
    const Map map = Map::of(task);
    const Outputs<T, Map::writes_two> out(task);
    if (rows.columns < T::width) {
        const Channel<typename T::Vector> channel = table.from(0);
        for (int64_t row = 0; row < rows.count; ++row)
            map_partial(rows.first + row * rows.stride, 0, channel, Partial{(int)rows.columns}, map, out);
        return;
    }
    const int64_t whole = stream ? rows.columns / T::width * T::width : 0;
    if constexpr (Simd::streams)
        if (whole) map_whole_columns<true, rows_of_map>(table, rows, 0, whole, ahead, map, out);
    if (whole == rows.columns) return;
    const int64_t begin = whole ? rows.columns - T::width : 0;
    if constexpr (Map::by_rows) {
        const bool by_rows = task.interleaved && task.N * task.C * task.S > most_in_fours;
        if (by_rows) return map_whole_columns<false, 1>(table, rows, begin, rows.columns, ahead, map, out);
    }
    map_whole_columns<false, rows_of_map>(table, rows, begin, rows.columns, ahead, map, out);
}

// The loops that are compiled for each kind of call; their callers are compiled once for each storage type.
template <class T>
struct ColumnLoops {
    void (*sum)(const Task&, const Table<T>&, const Rows&, const Copies<T>&, Sums<T>*);
    void (*sum_again)(const Task&, const Table<T>&, const Rows&, const Copies<T>&, Sums<T>*);  // about the mean of the first sums
    void (*map)(const Task&, const Table<T>&, const Rows&, bool stream, int64_t ahead);
};

}  // namespace
