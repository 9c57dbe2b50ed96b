// What a mask counts. Sums under a mask are taken over the counted values alone, side by side, so that no bit of them depends on what
// else there is, or on how much of it: each value's lane and place in the order follow from the counted ones before it.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace batchnorm {
namespace {  // each build keeps its own copy, see lanes.h

constexpr int word_positions = 8;
constexpr uint64_t all_counted = 0x0101010101010101u;

inline uint64_t mask_word(const uint8_t* mask) {
    uint64_t word;
    memcpy(&word, mask, sizeof word);
    return word;
}

// How many of so many positions count.
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

// The first position from `m` on that counts, or does not; `end` if there is none.
inline int64_t next(const uint8_t* mask, int64_t m, int64_t end, bool counts) {
    const uint64_t others = counts ? 0 : all_counted;
    while (m + word_positions <= end && mask_word(mask + m) == others) m += word_positions;
    while (m < end && (mask[m] != 0) != counts) ++m;
    return m;
}

// Positions that count, all of one row.
struct Run {
    int64_t first, count;
};

// All that count, cut into chunks of `chunk_values` of them: chunk k is runs first[k] ... first[k + 1] - 1. A mask of nothing makes one
// chunk without runs, no mask makes no chunk.
class CountedRuns {
  public:
    CountedRuns(const uint8_t* mask, int64_t positions, int64_t row, int64_t counted, int64_t chunk_values)
        : chunks(mask ? 1 + (counted > 0 ? (counted - 1) / chunk_values : 0) : 0) {
        if (!mask) return;
        first = (int64_t*)malloc((chunks + 1) * sizeof(int64_t));
        const int64_t count = cut(mask, positions, row, chunk_values, [](int64_t, int64_t, Run) {});
        runs = (Run*)malloc((count + 1) * sizeof(Run));
        first[0] = 0;
        cut(mask, positions, row, chunk_values, [&](int64_t chunk, int64_t number, Run run) {
            runs[number] = run;
            first[chunk + 1] = number + 1;
        });
        if (!count) first[1] = 0;
    }
    ~CountedRuns() {
        free(first);
        free(runs);
    }
    CountedRuns(const CountedRuns&) = delete;
    CountedRuns& operator=(const CountedRuns&) = delete;

    const Run* begin(int64_t chunk) const { return runs + first[chunk]; }
    const Run* end(int64_t chunk) const { return runs + first[chunk + 1]; }

    const int64_t chunks;

  private:
    int64_t* first = nullptr;
    Run* runs = nullptr;

    // body(chunk, number, run) for each run; how many there are.
    template <class Body>
    static int64_t cut(const uint8_t* mask, int64_t positions, int64_t row, int64_t chunk_values, const Body& body) {
        int64_t number = 0, chunk = 0, room = chunk_values;
        for (int64_t m = next(mask, 0, positions, true); m < positions; m = next(mask, m, positions, true)) {
            const int64_t row_end = (m / row + 1) * row, reach = row_end < m + room ? row_end : m + room;
            const int64_t end = next(mask, m, reach, false);
            body(chunk, number++, Run{m, end - m});
            room -= end - m;
            m = end;
            if (room == 0) ++chunk, room = chunk_values;
        }
        return number;
    }
};

}  // namespace
}  // namespace batchnorm
