// What a mask counts. Sums under a mask are taken over the counted values alone, side by side, so that no bit of them depends on what
// else there is, or on how much of it: each value's lane and place in the order follow from the counted ones before it.
#pragma once

#include <stdint.h>
#include <string.h>

namespace batchnorm {

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

// The position after the first `wanted` counted ones from `m` on; `positions` if there are no more.
inline int64_t after_counted(const uint8_t* mask, int64_t m, int64_t positions, int64_t wanted) {
    while (m + word_positions <= positions && wanted >= word_positions) {
        wanted -= counted(mask + m, word_positions);
        m += word_positions;
    }
    for (; m < positions && wanted > 0; ++m) wanted -= mask[m] != 0;
    return m;
}

// Copies the counted of so many values to to[filled], ...; how many are filled then. Writes up to a word past them.
template <class Element>
inline int64_t gather(const Element* from, const uint8_t* mask, int64_t count, Element* to, int64_t filled) {
    int64_t i = 0;
    for (; i + word_positions <= count; i += word_positions) {
        const uint64_t word = mask_word(mask + i);
        if (word == all_counted) {
            memcpy(to + filled, from + i, word_positions * sizeof(Element));
            filled += word_positions;
        } else if (word) {
            for (int place = 0; place < word_positions; ++place) {
                to[filled] = from[i + place];
                filled += mask[i + place] != 0;
            }
        }
    }
    for (; i < count; ++i) {
        to[filled] = from[i];
        filled += mask[i] != 0;
    }
    return filled;
}

}  // namespace batchnorm
