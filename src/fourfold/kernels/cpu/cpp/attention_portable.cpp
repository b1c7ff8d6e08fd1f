// Attention in plain C++ for any processor: float32 throughout, loops that a compiler can turn into vectors.
// A packed tile is the keys transposed, [D, 256], then the values, [256, D].
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention_kernel.h"
#include "kv_values.h"

namespace fourfold {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNever = -std::numeric_limits<float>::infinity();

std::int64_t tile_bytes(std::int64_t head_dim) { return 2 * kTileKeys * head_dim * 4; }

std::int64_t query_bytes(std::int64_t head_dim) { return head_dim * 4; }

void pack_query(const float* q, std::int64_t head_dim, void* packed) {
    std::memcpy(packed, q, static_cast<std::size_t>(head_dim) * 4);
}

void pack_tile(const KeyTile& tile, void* packed) {
    const AttentionProblem& p = *tile.problem;
    float* keys = static_cast<float*>(packed);
    float* values = keys + kTileKeys * p.head_dim;
    std::int64_t offsets[kTileKeys];
    key_offsets(tile, tile.end - tile.begin, offsets);
    for (std::int64_t i = 0; i < tile.end - tile.begin; ++i)
        for (std::int64_t d = 0; d < p.head_dim; ++d) {
            keys[d * kTileKeys + i] = kv_value(p.cache, p.type, offsets[i] + d);
            values[i * p.head_dim + d] = kv_value(p.cache, p.type, offsets[i] + p.kv_heads * p.head_dim + d);
        }
}

void scores(const KeyTile& tile, const float* keys, const float* q, std::int64_t count, float* s) {
    const AttentionProblem& p = *tile.problem;
    std::fill(s, s + count, 0.0f);
    for (std::int64_t d = 0; d < p.head_dim; ++d)
        for (std::int64_t i = 0; i < count; ++i) s[i] += q[d] * keys[d * kTileKeys + i];
    float scale = p.scale * (p.kv_scales ? p.kv_scales[tile.kv_head] : 1.0f);
    if (p.softcap > 0.0f)
        for (std::int64_t i = 0; i < count; ++i) s[i] = std::tanh(s[i] * (scale / p.softcap)) * p.softcap * kLog2E;
    else
        for (std::int64_t i = 0; i < count; ++i) s[i] *= scale * kLog2E;
}

// Merges what a row at `position` makes of the tile into its state.
void attend_row(const KeyTile& tile, const float* packed, const float* q, std::int64_t position, float* part) {
    const AttentionProblem& p = *tile.problem;
    float s[kTileKeys];
    std::int64_t end = std::min(tile.end, position + 1) - tile.begin;
    std::int64_t begin = p.window ? std::max<std::int64_t>(0, position - p.window + 1 - tile.begin) : 0;
    float* tail = part + p.head_dim;
    std::fill(part, part + p.head_dim, 0.0f);
    tail[0] = kNever;
    tail[1] = 0.0f;
    if (begin >= end) return;
    scores(tile, packed, q, end, s);
    tail[0] = *std::max_element(s + begin, s + end);
    const float* values = packed + kTileKeys * p.head_dim;
    for (std::int64_t i = begin; i < end; ++i) {
        float weight = std::exp2(s[i] - tail[0]);
        tail[1] += weight;
        for (std::int64_t d = 0; d < p.head_dim; ++d) part[d] += weight * values[i * p.head_dim + d];
    }
}

void merge(float* state, const float* part, std::int64_t head_dim) {
    float most = std::max(state[head_dim], part[head_dim]);
    if (part[head_dim] == kNever) return;
    float kept = std::exp2(state[head_dim] - most), added = std::exp2(part[head_dim] - most);
    for (std::int64_t d = 0; d < head_dim; ++d) state[d] = state[d] * kept + part[d] * added;
    state[head_dim] = most;
    state[head_dim + 1] = state[head_dim + 1] * kept + part[head_dim + 1] * added;
}

void attend(const KeyTile& tile, const void* packed, const QueryRows& rows) {
    constexpr std::int64_t kMostHeadDim = 1024;
    const std::int64_t head_dim = tile.problem->head_dim;
    float part[kMostHeadDim + kStateTail];
    for (std::int64_t row = 0; row < rows.count; ++row) {
        attend_row(tile, static_cast<const float*>(packed), static_cast<const float*>(rows.queries) + row * head_dim,
                   rows.start + row / rows.group, part);
        merge(rows.states + row * (head_dim + kStateTail), part, head_dim);
    }
}

}  // namespace

const AttentionKernel kAttentionPortable = {tile_bytes, query_bytes, pack_query, pack_tile, attend, nullptr, merge};

}  // namespace fourfold
