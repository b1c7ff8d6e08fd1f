// Attention for AVX-512 straight from the cache, for few rows: keys are turned and values are interleaved in
// registers, used at once and never stored, in the same order of sums as on packed tiles. What decoding does.
//
// Memory is the limit here, and a head's rows are scattered over it: while keys are used their values are fetched,
// and while values are used the next tile's keys.
#pragma once

#include "attention_avx512_stored.h"

namespace fourfold {
namespace {

// C columns of keys at a time, so that there are chains of sums enough to fill the multipliers.
template <class S, int R, int C>
inline void score_direct(const AttentionProblem& p, const Rows& rows, bool first, Block& block) {
    using A = typename S::Arithmetic;
    const std::int64_t lanes = p.head_dim / A::kPer, fetched = (8 * C * kColumn + lanes - 1) / lanes;
    for (std::int64_t k = block.first; k < block.last; k += C * kColumn) {
        __m512 sums[R][C];
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
        std::int64_t ahead = 0;
        for (std::int64_t i = 0; i < lanes; i += 8, ahead += fetched) {
            const std::int64_t count = most(0, least(fetched, C * kColumn - ahead));
            if (first) fetch<S>(p, rows.keys + k + kFetchAhead + ahead, count);
            fetch<S>(p, rows.values + k + ahead, count);
            __m512i keys[C][8];
            for (int c = 0; c < C; ++c) load_keys<S>(p.cache, rows.keys + k + c * kColumn, i * A::kPer, keys[c]);
            for (int j = 0; j < 8; ++j)
                for (int r = 0; r < R; ++r) {
                    const __m512 q = _mm512_set1_ps(block.query[r * lanes + i + j]);
                    for (int c = 0; c < C; ++c) sums[r][c] = A::dot(sums[r][c], _mm512_castsi512_ps(keys[c][j]), q);
                }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) _mm512_store_ps(block.scores[r] + k + c * kColumn, sums[r][c]);
    }
}

// Features [d, d + 16 C).
template <class S, int R, int C>
inline void sum_direct_columns(const AttentionProblem& p, const Rows& rows, const Block& block, std::int64_t d) {
    constexpr int kPer = S::Arithmetic::kPer;
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    for (std::int64_t k = block.first; k < block.last; k += kPer) {
        if (rows.more && d == 0) fetch<S>(p, rows.keys + rows.padded + k, kPer);
        __m512 values[C];
        for (int c = 0; c < C; ++c) values[c] = load_values<S>(p.cache, rows.values + k, d + c * 16);
        for (int r = 0; r < R; ++r) {
            const __m512 weight = _mm512_set1_ps(block.weights[r][k / kPer]);
            for (int c = 0; c < C; ++c) sums[r][c] = S::Arithmetic::dot(sums[r][c], values[c], weight);
        }
    }
    add_to_states(sums, block, p.head_dim, d);
}

template <class S, int R, int C>
inline void sum_direct(const AttentionProblem& p, const Rows& rows, const Block& block, std::int64_t d) {
    for (; d + C * 16 <= p.head_dim; d += C * 16) sum_direct_columns<S, R, C>(p, rows, block, d);
    if constexpr (C > 1) sum_direct<S, R, C / 2>(p, rows, block, d);
}
template <class S, int R>
void attend_few(const KeyTile& tile, const QueryRows& rows) {
    Block block;
    if (!look<typename S::Arithmetic, R>(tile, rows, 0, block)) return;
    const Rows cached(tile);
    score_direct<S, R, (R > 7 ? 1 : 2)>(*tile.problem, cached, tile.first, block);
    for (int r = 0; r < R; ++r) weigh<typename S::Arithmetic>(tile, block, r);
    sum_direct<S, R, (R > 6 ? 2 : R > 3 ? 4 : 8)>(*tile.problem, cached, block, 0);
}

template <class S>
void attend_direct(const KeyTile& tile, const QueryRows& rows) {
    switch (rows.count) {
        case 1: return attend_few<S, 1>(tile, rows);
        case 2: return attend_few<S, 2>(tile, rows);
        case 3: return attend_few<S, 3>(tile, rows);
        case 4: return attend_few<S, 4>(tile, rows);
        case 5: return attend_few<S, 5>(tile, rows);
        case 6: return attend_few<S, 6>(tile, rows);
        case 7: return attend_few<S, 7>(tile, rows);
        case 8: return attend_few<S, 8>(tile, rows);
    }
}

}  // namespace
}  // namespace fourfold
