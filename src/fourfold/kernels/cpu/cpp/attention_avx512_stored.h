// Attention for AVX-512: from the cache as it is stored to vectors of lanes.
//
// A Stored has: Arithmetic, kBytes of an element, and load(cache, a, b): the 8 lanes that begin at element a, then
// the 8 that begin at b. A head is a whole number of times 8 lanes.
#pragma once

#include "attention_avx512.h"

namespace fourfold {
namespace {

constexpr std::int64_t kFetchAhead = 4 * kColumn;

// Where a tile's keys and values stand in the cache, in elements. The last ones stand in for what is missing in
// whole pairs of columns: their weights are zero there.
struct Rows {
    std::int64_t padded;
    bool more;  // the tile after this one follows its keys
    std::int64_t keys[2 * kTileKeys + kFetchAhead];
    std::int64_t values[kTileKeys];

    explicit Rows(const KeyTile& tile) {
        const AttentionProblem& p = *tile.problem;
        const std::int64_t count = tile.end - tile.begin, known = count + tile.next;
        padded = (count + 2 * kColumn - 1) / (2 * kColumn) * (2 * kColumn);
        more = tile.next > 0;
        key_offsets(tile, known, keys);
        const std::int64_t wanted = padded + most(kFetchAhead, more ? padded : 0);
        for (std::int64_t i = known; i < wanted; ++i) keys[i] = keys[known - 1];
        for (std::int64_t i = 0; i < padded; ++i) values[i] = keys[i] + p.kv_heads * p.head_dim;
    }
};

// Rows on their way into the second cache. The first has room for too few requests to keep memory busy.
template <class S>
inline void fetch(const AttentionProblem& p, const std::int64_t* rows, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i)
        for (std::int64_t d = 0; d < p.head_dim; d += 64 / S::kBytes)
            _mm_prefetch(static_cast<const char*>(p.cache) + (rows[i] + d) * S::kBytes, _MM_HINT_T1);
}

// Eight lanes of 16 keys, from feature d on: vector i holds lane i of every key.
template <class S>
inline void load_keys(const void* cache, const std::int64_t* keys, std::int64_t d, __m512i (&lanes)[8]) {
    __m512i pairs[8], quads[8];
    for (int i = 0; i < 8; ++i) lanes[i] = S::load(cache, keys[i] + d, keys[i + 8] + d);
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(lanes[i], lanes[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(lanes[i], lanes[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    // 16 bytes of a quad: lanes j and j + 4 of keys 0 to 3, then of keys 8 to 11; the other quad has the rest
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int j = 0; j < 4; ++j) {
        lanes[j] = _mm512_permutex2var_epi64(quads[j], low, quads[j + 4]);
        lanes[j + 4] = _mm512_permutex2var_epi64(quads[j], high, quads[j + 4]);
    }
}

// Features [d, d + 16) of the values of a lane of keys.
template <class S>
inline __m512 load_values(const void* cache, const std::int64_t* values, std::int64_t d) {
    if constexpr (S::Arithmetic::kPer == 1) {
        return _mm512_castsi512_ps(S::load(cache, values[0] + d, values[0] + d + 8));
    } else {
        alignas(64) static const std::uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i both = S::load(cache, values[0] + d, values[1] + d);
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(order), both));
    }
}

}  // namespace
}  // namespace fourfold
