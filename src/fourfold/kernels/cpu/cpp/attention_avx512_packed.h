// Attention for AVX-512 on packed tiles, for many rows: six rows by four vectors fill the registers.
//
// A packed tile is the keys, [16 columns of 16 keys][D in lanes][16 keys], then the values, [keys in lanes][D].
#pragma once

#include "attention_avx512_stored.h"

namespace fourfold {
namespace {

template <class S>
void pack(const KeyTile& tile, void* packed) {
    using A = typename S::Arithmetic;
    const AttentionProblem& p = *tile.problem;
    const Rows rows(tile);
    const std::int64_t lanes = p.head_dim / A::kPer;
    float* keys = static_cast<float*>(packed);
    float* values = keys + kTileKeys * lanes;
    for (std::int64_t k = 0; k < rows.padded; k += kColumn) {
        fetch<S>(p, rows.keys + k + kFetchAhead, kColumn);
        fetch<S>(p, rows.values + k, kColumn);
        for (std::int64_t i = 0; i < lanes; i += 8, keys += 8 * kColumn) {
            __m512i part[8];
            load_keys<S>(p.cache, rows.keys + k, i * A::kPer, part);
            for (int j = 0; j < 8; ++j) _mm512_store_si512(keys + j * kColumn, part[j]);
        }
    }
    for (std::int64_t k = 0; k < rows.padded; k += A::kPer, values += p.head_dim)
        for (std::int64_t d = 0; d < p.head_dim; d += 16)
            _mm512_store_ps(values + d, load_values<S>(p.cache, rows.values + k, d));
}

template <class A, int R, int C>
inline void score_columns(const float* keys, std::int64_t lanes, const float* query, float* scores) {
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < lanes; ++i) {
        __m512 key[C];
        for (int c = 0; c < C; ++c) key[c] = _mm512_load_ps(keys + (c * lanes + i) * kColumn);
        for (int r = 0; r < R; ++r) {
            const __m512 q = _mm512_set1_ps(query[r * lanes + i]);
            for (int c = 0; c < C; ++c) sums[r][c] = A::dot(sums[r][c], key[c], q);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) _mm512_store_ps(scores + r * kTileKeys + c * kColumn, sums[r][c]);
}

template <class A, int R, int C>
inline void score(const float* keys, std::int64_t lanes, Block& block, std::int64_t column) {
    for (; (column + C - 1) * kColumn < block.last; column += C)
        score_columns<A, R, C>(keys + column * lanes * kColumn, lanes, block.query,
                               &block.scores[0][column * kColumn]);
    if constexpr (C > 1) score<A, R, C / 2>(keys, lanes, block, column);
}

template <class A, int R, int C>
inline void sum_columns(const float* values, std::int64_t head_dim, const Block& block, std::int64_t d) {
    __m512 sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = _mm512_setzero_ps();
    const std::int64_t from = block.first / A::kPer, to = (block.last + A::kPer - 1) / A::kPer;
    for (std::int64_t k = from; k < to; ++k) {
        __m512 value[C];
        for (int c = 0; c < C; ++c) value[c] = _mm512_load_ps(values + k * head_dim + d + c * 16);
        for (int r = 0; r < R; ++r) {
            const __m512 weight = _mm512_set1_ps(block.weights[r][k]);
            for (int c = 0; c < C; ++c) sums[r][c] = A::dot(sums[r][c], value[c], weight);
        }
    }
    add_to_states(sums, block, head_dim, d);
}

template <class A, int R, int C>
inline void sum_values(const float* values, std::int64_t head_dim, const Block& block, std::int64_t d) {
    for (; d + C * 16 <= head_dim; d += C * 16) sum_columns<A, R, C>(values, head_dim, block, d);
    if constexpr (C > 1) sum_values<A, R, C / 2>(values, head_dim, block, d);
}

template <class A, int R>
void attend_block(const KeyTile& tile, const float* packed, const QueryRows& rows, std::int64_t row) {
    constexpr int C = R > 3 ? 4 : 8;
    const std::int64_t head_dim = tile.problem->head_dim, lanes = head_dim / A::kPer;
    Block block;
    if (!look<A, R>(tile, rows, row, block)) return;
    score<A, R, C>(packed, lanes, block, block.first / kColumn);
    for (int r = 0; r < R; ++r) weigh<A>(tile, block, r);
    sum_values<A, R, C>(packed + kTileKeys * lanes, head_dim, block, 0);
}

template <class A>
void attend_rows(const KeyTile& tile, const void* packed, const QueryRows& rows) {
    auto* lanes = static_cast<const float*>(packed);
    std::int64_t row = 0;
    for (; row + 6 <= rows.count; row += 6) attend_block<A, 6>(tile, lanes, rows, row);
    switch (rows.count - row) {
        case 5: return attend_block<A, 5>(tile, lanes, rows, row);
        case 4: return attend_block<A, 4>(tile, lanes, rows, row);
        case 3: return attend_block<A, 3>(tile, lanes, rows, row);
        case 2: return attend_block<A, 2>(tile, lanes, rows, row);
        case 1: return attend_block<A, 1>(tile, lanes, rows, row);
    }
}

}  // namespace
}  // namespace fourfold
