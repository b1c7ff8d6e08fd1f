// Attention for AVX-512: softmax over one tile, for a block of rows. For files compiled for AVX-512, each with its
// own copy; shared by float32 and bf16 arithmetic.
//
// A lane is 4 bytes: one float32, or the bf16 of two neighbours. An Arithmetic has: kPer (values in a lane),
// dot(sum, lanes, lanes), and store_weights (32 floats to 32 weights). Scores and sums of values are both outer
// products, vectors of 16 keys or features times a lane of a query, or of its weights, broadcast. Every sum runs in
// one order whatever the rows beside it are.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "attention_kernel.h"

namespace fourfold {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr int kRowsTogether = 8;  // at most
constexpr std::int64_t kColumn = 16;  // keys
constexpr std::int64_t kColumns = kTileKeys / kColumn;

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// 2^x within 1.6e-7 of it, relatively; exactly 0 below -150, exactly 1 at 0; a NaN stays one.
inline __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_fmadd_ps(part, _mm512_set1_ps(0x1.5bba1ap-10f), _mm512_set1_ps(0x1.3cea88p-7f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(0x1.c6b752p-5f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(0x1.ebf9bcp-3f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(0x1.62e42ap-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

// tanh within 2e-7 absolutely.
inline __m512 hyperbolic_tangent(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(20.0f), x);
    __m512 power = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(2.0f * kLog2E)));
    __m512 ratio = _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(power, _mm512_set1_ps(1.0f)));
    return _mm512_sub_ps(_mm512_set1_ps(1.0f), ratio);
}

inline float lane(__m512 x) { return _mm512_cvtss_f32(x); }

// Which of the 16 keys from `key` on lie in [begin, end).
inline __mmask16 seen(std::int64_t key, std::int64_t begin, std::int64_t end) {
    if (key >= begin && key + 16 <= end) return 0xFFFF;
    std::uint32_t low = (1u << most(0, least(16, begin - key))) - 1;
    std::uint32_t high = (1u << most(0, least(16, end - key))) - 1;
    return static_cast<__mmask16>(high & ~low);
}

// Rows of a block: what they see of the tile, and how to bring their states up to date.
struct Block {
    const float* query;  // lanes
    float* states;
    std::int64_t begin[kRowsTogether], end[kRowsTogether];  // keys of the tile
    std::int64_t first, last;                               // of all rows; first is a multiple of 32
    float kept[kRowsTogether], added[kRowsTogether];
    alignas(64) float scores[kRowsTogether][kTileKeys];
    alignas(64) float weights[kRowsTogether][kTileKeys];  // lanes
};

// What R rows from `row` on see of the tile; false if nothing.
template <class A, int R>
inline bool look(const KeyTile& tile, const QueryRows& rows, std::int64_t row, Block& block) {
    const AttentionProblem& p = *tile.problem;
    block.query = static_cast<const float*>(rows.queries) + row * (p.head_dim / A::kPer);
    block.states = rows.states + row * (p.head_dim + kStateTail);
    std::int64_t first = kTileKeys, last = 0;
    for (int r = 0; r < R; ++r) {
        const std::int64_t position = rows.start + (row + r) / rows.group;
        block.begin[r] = p.window ? most(0, position - p.window + 1 - tile.begin) : 0;
        block.end[r] = least(tile.end, position + 1) - tile.begin;
        first = least(first, block.begin[r]);
        last = most(last, block.end[r]);
    }
    block.first = first / (2 * kColumn) * (2 * kColumn);
    block.last = last;
    return first < last;
}

// Scores of row r to weights; its maximum and sum go into its state.
template <class A>
inline void weigh(const KeyTile& tile, Block& block, int r) {
    const AttentionProblem& p = *tile.problem;
    const float key_scale = p.kv_scales ? p.kv_scales[tile.kv_head] : 1.0f;
    float* scores = block.scores[r];
    const std::int64_t begin = block.begin[r], end = block.end[r];
    float scale = p.scale * key_scale * kLog2E;
    if (p.softcap > 0.0f) {
        const __m512 inner = _mm512_set1_ps(p.scale * key_scale / p.softcap);
        for (std::int64_t k = block.first; k < end; k += kColumn)
            _mm512_store_ps(scores + k, hyperbolic_tangent(_mm512_mul_ps(_mm512_load_ps(scores + k), inner)));
        scale = p.softcap * kLog2E;
    }
    const __m512 never = _mm512_set1_ps(-__builtin_inff());
    __m512 peaks = never;
    for (std::int64_t k = block.first; k < end; k += kColumn) {
        const __mmask16 mask = seen(k, begin, end);
        peaks = _mm512_mask_max_ps(peaks, mask, peaks, _mm512_load_ps(scores + k));
    }
    float* state = block.states + r * (p.head_dim + kStateTail) + p.head_dim;
    const float peak = _mm512_reduce_max_ps(peaks) * scale;
    const __m512 shift = _mm512_set1_ps(-peak), factor = _mm512_set1_ps(scale);
    __m512 total = _mm512_setzero_ps();
    for (std::int64_t k = block.first; k < block.last; k += 2 * kColumn) {
        __m512 low = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + k), factor, shift));
        __m512 high = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + k + kColumn), factor, shift));
        low = _mm512_maskz_mov_ps(seen(k, begin, end), low);
        high = _mm512_maskz_mov_ps(seen(k + kColumn, begin, end), high);
        total = _mm512_add_ps(total, _mm512_add_ps(low, high));
        A::store_weights(block.weights[r] + k / A::kPer, low, high);
    }
    block.kept[r] = 1.0f;
    block.added[r] = 0.0f;
    if (end <= begin) return;
    const float both = state[0] > peak ? state[0] : peak;
    block.kept[r] = lane(power_of_two(_mm512_set1_ps(state[0] - both)));
    block.added[r] = lane(power_of_two(_mm512_set1_ps(peak - both)));
    state[0] = both;
    state[1] = __builtin_fmaf(_mm512_reduce_add_ps(total), block.added[r], state[1] * block.kept[r]);
}

// Adds R rows' sums over the tile to their states, features [d, d + 16 C).
template <int R, int C>
inline void add_to_states(const __m512 (&sums)[R][C], const Block& block, std::int64_t head_dim, std::int64_t d) {
    for (int r = 0; r < R; ++r) {
        const __m512 kept = _mm512_set1_ps(block.kept[r]), added = _mm512_set1_ps(block.added[r]);
        float* state = block.states + r * (head_dim + kStateTail) + d;
        for (int c = 0; c < C; ++c) {
            __m512 old = _mm512_mul_ps(_mm512_load_ps(state + c * 16), kept);
            _mm512_store_ps(state + c * 16, _mm512_fmadd_ps(sums[r][c], added, old));
        }
    }
}

void merge_states(float* state, const float* part, std::int64_t head_dim) {
    const float old = state[head_dim], peak = part[head_dim], both = old > peak ? old : peak;
    if (peak == -__builtin_inff()) return;
    const float kept = lane(power_of_two(_mm512_set1_ps(old - both)));
    const float added = lane(power_of_two(_mm512_set1_ps(peak - both)));
    for (std::int64_t d = 0; d < head_dim; d += 16) {
        __m512 scaled = _mm512_mul_ps(_mm512_load_ps(state + d), _mm512_set1_ps(kept));
        _mm512_store_ps(state + d, _mm512_fmadd_ps(_mm512_load_ps(part + d), _mm512_set1_ps(added), scaled));
    }
    state[head_dim] = both;
    state[head_dim + 1] = __builtin_fmaf(part[head_dim + 1], added, state[head_dim + 1] * kept);
}

}  // namespace
}  // namespace fourfold
