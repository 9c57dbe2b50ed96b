// The counted values of a planar tensor as vectors, which are the same in every channel. They are summed as if they were contiguous: each
// run continues in the lane after the end of the run before it. So most runs begin and end in partial vectors; the 0 in their other
// lanes changes no sum.
#pragma once

#include "kernels/columns.h"

namespace {

template <class T>
class CountedVectors {
  public:
    // A partial vector, which begins `at` elements after its portion's first row, and `whole` vectors right after it.
    struct Vectors {
        int64_t at;
        Partial lanes;
        int32_t whole;
    };
    // The unit that is summed in one channel before the next channel: vectors first ... last - 1, which lie in elements begin ... end - 1
    // of `rows` rows from `row` on.
    struct Portion {
        int64_t row, rows, begin, end, first, last;
    };

    // Rows have S elements and begin `stride` elements apart. Without a mask there are no vectors.
    CountedVectors(const uint8_t* mask, int64_t N, int64_t S, int64_t stride, int64_t counted)
        : portions(mask, counted, chunk_values), rows_together(at_least(together / at_least(S, 1), 1)), S(S), stride(stride) {
        if (!mask) return;
        batchnorm::for_runs(mask, N * S, S, chunk_values, [&](int64_t chunk, batchnorm::Run run) { add(chunk, run); });
    }

    const Vectors* begin(const Portion& portion) const { return vectors.items + portion.first; }
    const Vectors* end(const Portion& portion) const { return vectors.items + portion.last; }

    batchnorm::Chunked<Portion> portions;
    const int64_t rows_together;  // the most rows of a portion

  private:
    static constexpr int64_t most_vectors = 64;  // of a portion
    static constexpr int64_t together = 256;     // shorter rows share a portion

    const int64_t S, stride;
    batchnorm::List<Vectors> vectors;
    int64_t last_chunk = -1, room = 0;  // of the last portion
    int lane = 0;

    void add(int64_t chunk, batchnorm::Run run) {
        for (int64_t place = run.first, end = run.first + run.count; place < end;) {
            Portion& portion = portion_for(chunk, run.row, place);
            const int count = (int)at_most(T::width - lane, end - place);
            Vectors here = {(run.row - portion.row) * stride + place - lane, Partial::between(lane, lane + count), 0};
            lane = (lane + count) % T::width, place += count, --room;
            if (!lane) here.whole = (int32_t)at_most((end - place) / T::width, room);
            place += here.whole * T::width, room -= here.whole;
            vectors.add(here);
            portion.rows = run.row - portion.row + 1, portion.last = vectors.count;
        }
    }

    Portion& portion_for(int64_t chunk, int64_t row, int64_t place) {
        if (chunk == last_chunk && room > 0 && row < portions.last().row + rows_together) return portions.last();
        if (chunk != last_chunk) lane = 0;
        const bool goes_on = last_chunk >= 0 && rows_together == 1 && portions.last().row == row;
        if (goes_on) portions.last().end = place;
        portions.add(chunk, {row, 1, goes_on ? place : 0, S, vectors.count, vectors.count});
        last_chunk = chunk, room = most_vectors;
        return portions.last();
    }
};

}  // namespace
