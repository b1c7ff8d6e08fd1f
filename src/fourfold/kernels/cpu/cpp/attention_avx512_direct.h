// Attention for AVX-512 straight from the cache, for few rows: keys are turned and values are interleaved in
// registers, used at once and never stored, in the same order of sums as on packed tiles. What decoding does.
//
// Memory is the limit here, and a head's rows are scattered over it: while keys are used their values are fetched,
// and while values are used the next tile's keys.
#pragma once

#include "attention_avx512_stored.h"

namespace fourfold {
namespace {

template <class S, int R>
inline void score_direct(const AttentionProblem& p, const Rows& rows, bool first, Block& block) {
    using A = typename S::Arithmetic;
    const std::int64_t lanes = p.head_dim / A::kPer;
    for (std::int64_t k = block.first; k < block.last; k += kColumn) {
        if (first) fetch<S>(p, rows.keys + k + kFetchAhead);
        fetch<S>(p, rows.values + k);
        __m512 sums[R];
        for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_ps();
        for (std::int64_t i = 0; i < lanes; i += kColumn) {
            __m512i column[16];
            load_column<S>(p, rows.keys + k, i * A::kPer, column);
            const auto add = [&](int j) {
                const __m512 key = _mm512_castsi512_ps(column[j]);
                const float* query = block.query + i + j;
                for (int r = 0; r < R; ++r) sums[r] = A::dot(sums[r], key, _mm512_set1_ps(query[r * lanes]));
            };
            for (int j = 0; j < 8; ++j) add(j);
            if (i + 8 < lanes)
                for (int j = 8; j < 16; ++j) add(j);
        }
        for (int r = 0; r < R; ++r) _mm512_store_ps(block.scores[r] + k, sums[r]);
    }
}

// Features [d, d + 16 C).
template <class S, int R, int C>
inline void sum_direct_columns(const AttentionProblem& p, const Rows& rows, const Block& block, std::int64_t d) {
    constexpr int kPer = S::Arithmetic::kPer, kSteps = (C + kPer - 1) / kPer;
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    for (std::int64_t k = block.first; k < block.last; k += kPer) {
        if (rows.more && d == 0 && k % kColumn == 0) fetch<S>(p, rows.keys + rows.padded + k);
        for (int s = 0; s < kSteps; ++s) {
            __m512 parts[kPer];
            load_values<S>(p, rows.values + k, d + s * 16 * kPer, parts);
            for (int r = 0; r < R; ++r) {
                const __m512 weight = _mm512_set1_ps(block.weights[r][k / kPer]);
                for (int j = 0; j < kPer && s * kPer + j < C; ++j)
                    sums[r][s * kPer + j] = S::Arithmetic::dot(sums[r][s * kPer + j], parts[j], weight);
            }
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
    score_direct<S, R>(*tile.problem, cached, tile.first, block);
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
