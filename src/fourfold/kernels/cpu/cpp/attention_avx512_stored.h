// Attention for AVX-512: from the cache as it is stored to vectors of lanes.
//
// A Stored has: Arithmetic, kBytes of an element, load(cache, at): 16 lanes from element `at` on, and, where a lane
// holds two, load_half: 16 elements and then zeros.
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

template <class S>
inline __m512i load(const void* cache, std::int64_t at, std::int64_t left) {
    if constexpr (S::Arithmetic::kPer == 2)
        if (left < 32) return S::load_half(cache, at);
    (void)left;
    return S::load(cache, at);
}

// 16 rows on their way into the second cache. The first has room for too few requests to keep memory busy.
template <class S>
inline void fetch(const AttentionProblem& p, const std::int64_t* rows) {
    const std::int64_t bytes = p.head_dim * S::kBytes;
    for (int i = 0; i < kColumn; ++i)
        for (std::int64_t b = 0; b < bytes; b += 64)
            _mm_prefetch(static_cast<const char*>(p.cache) + rows[i] * S::kBytes + b, _MM_HINT_T1);
}

// 16 vectors of 16 lanes: lane j of vector i becomes lane i of vector j.
inline void transpose(__m512i (&rows)[16]) {
    __m512i pairs[16], quads[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {
        __m512i a = _mm512_shuffle_i32x4(quads[j], quads[j + 4], 0x88);
        __m512i b = _mm512_shuffle_i32x4(quads[j], quads[j + 4], 0xDD);
        __m512i c = _mm512_shuffle_i32x4(quads[j + 8], quads[j + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(quads[j + 8], quads[j + 12], 0xDD);
        rows[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        rows[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
        rows[j + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}

// Features [d, d + 16 lanes) of 16 keys: vector i holds lane i of every key.
template <class S>
inline void load_column(const AttentionProblem& p, const std::int64_t* keys, std::int64_t d, __m512i (&column)[16]) {
    for (int i = 0; i < 16; ++i) column[i] = load<S>(p.cache, keys[i] + d, p.head_dim - d);
    transpose(column);
}

// Features [d, d + 16 * kPer) of the kPer values of a lane of keys: 16 features, then 16 more.
template <class S>
inline void load_values(const AttentionProblem& p, const std::int64_t* values, std::int64_t d,
                        __m512 (&parts)[S::Arithmetic::kPer]) {
    const auto at = [&](int i) { return load<S>(p.cache, values[i] + d, p.head_dim - d); };
    if constexpr (S::Arithmetic::kPer == 1) {
        parts[0] = _mm512_castsi512_ps(at(0));
    } else {
        alignas(64) static const std::uint16_t order[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                            37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                            11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i lower = _mm512_load_si512(order), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
        const __m512i first = at(0), second = at(1);
        parts[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, lower, second));
        parts[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, upper, second));
    }
}

}  // namespace
}  // namespace fourfold
