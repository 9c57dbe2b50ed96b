// The positions that a mask counts. Sums under a mask add the counted values as if they were contiguous: the lane and the order in which
// a value is added depend only on the counted values before it. So padding changes no bit of a sum, whatever its values and its length.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace batchnorm {
namespace {  // each build has its own copy, see simd/types.h

constexpr int word_positions = 8;
constexpr uint64_t all_counted = 0x0101010101010101u;

inline uint64_t mask_word(const uint8_t* mask) {
    uint64_t word;
    memcpy(&word, mask, sizeof word);
    return word;
}

// How many of the first `positions` positions count.
inline int64_t counted(const uint8_t* mask, int64_t positions) {
    int64_t count = 0, m = 0;
    for (; m + word_positions <= positions; m += word_positions) {
        const uint64_t word = mask_word(mask + m);
        if (word == all_counted) {
            count += word_positions;
        } else if (word) {
            for (int place = 0; place < word_positions; ++place) count += mask[m + place] != 0;
        }
    }
    for (; m < positions; ++m) count += mask[m] != 0;
    return count;
}

// The first position from `m` on that counts (or, without `counts`, that does not); `end` if there is none.
inline int64_t next(const uint8_t* mask, int64_t m, int64_t end, bool counts) {
    const uint64_t others = counts ? 0 : all_counted;
    while (m + word_positions <= end && mask_word(mask + m) == others) m += word_positions;
    while (m < end && (mask[m] != 0) != counts) ++m;
    return m;
}

// Consecutive positions of one row that count; `first` is an index in the row.
struct Run {
    int64_t row, first, count;
};

// Calls body(chunk, run) for all runs in order, cut into chunks of `chunk_values` counted positions.
template <class Body>
inline void for_runs(const uint8_t* mask, int64_t positions, int64_t row, int64_t chunk_values, const Body& body) {
    int64_t chunk = 0, room = chunk_values;
    for (int64_t m = next(mask, 0, positions, true); m < positions; m = next(mask, m, positions, true)) {
        const int64_t begin = m / row * row, row_end = begin + row, reach = row_end < m + room ? row_end : m + room;
        const int64_t end = next(mask, m, reach, false);
        body(chunk, Run{m / row, m - begin, end - m});
        room -= end - m;
        m = end;
        if (room == 0) ++chunk, room = chunk_values;
    }
}

template <class Item>
class List {
  public:
    List() = default;
    ~List() { free(items); }
    List(const List&) = delete;
    List& operator=(const List&) = delete;

    void add(Item item) {
        if (count == room) items = (Item*)realloc(items, (room = 2 * room + 64) * sizeof(Item));
        items[count++] = item;
    }

    Item* items = nullptr;
    int64_t count = 0;

  private:
    int64_t room = 0;
};

// A list of items in chunks. A mask that counts nothing makes one empty chunk; without a mask there is no chunk.
template <class Item>
class Chunked {
  public:
    Chunked(const uint8_t* mask, int64_t counted, int64_t chunk_values)
        : chunks(mask ? 1 + (counted > 0 ? (counted - 1) / chunk_values : 0) : 0) {
        ends = (int64_t*)calloc(chunks + 1, sizeof(int64_t));
    }
    ~Chunked() { free(ends); }
    Chunked(const Chunked&) = delete;
    Chunked& operator=(const Chunked&) = delete;

    // Adds an item to the last chunk so far, or to the next one.
    void add(int64_t chunk, Item item) {
        list.add(item);
        ends[chunk + 1] = list.count;
    }
    Item& last() { return list.items[list.count - 1]; }
    const Item* begin(int64_t chunk) const { return list.items + ends[chunk]; }
    const Item* end(int64_t chunk) const { return list.items + ends[chunk + 1]; }

    const int64_t chunks;

  private:
    List<Item> list;
    int64_t* ends;  // ends[chunk + 1] is the end of a chunk, and ends[chunk] its beginning
};

}  // namespace
}  // namespace batchnorm
