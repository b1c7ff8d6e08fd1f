// Attention for any processor: float32 throughout, in the vectors that GCC and Clang have on all of them, a few rows
// side by side. Another file includes this one to compile it for AVX2.
// A packed tile is the keys, [16 columns of 16 keys][D][16 keys], then the values, [256][D].
#include <cstring>
#include <limits>

#include "attention_kernel.h"

#if !defined(FOURFOLD_ATTENTION_KERNEL)
#define FOURFOLD_ATTENTION_KERNEL kAttentionPortable
#endif
#define FOURFOLD_INLINE inline __attribute__((always_inline))

namespace fourfold {
namespace {

#if defined(__AVX2__)
constexpr int kVectorBytes = 32, kRowsTogether = 4;
#else
constexpr int kVectorBytes = 16, kRowsTogether = 2;
#endif
constexpr std::int64_t kLanes = kVectorBytes / 4, kColumn = 16, kParts = kColumn / kLanes;

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Ints = std::int32_t __attribute__((vector_size(kVectorBytes)));
using Halves = std::uint16_t __attribute__((vector_size(kVectorBytes / 2)));
using Bytes = std::int8_t __attribute__((vector_size(kVectorBytes / 4)));

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNever = -std::numeric_limits<float>::infinity();

constexpr std::int64_t kMostHeadDim = 1024;

// Rows side by side: their scores of a tile, then weights, and what the tile alone makes of their states.
struct Block {
    alignas(64) float scores[kRowsTogether][kTileKeys];
    alignas(64) float parts[kRowsTogether][kMostHeadDim + kStateTail];
};

FOURFOLD_INLINE void read(const float* from, Floats& to) { std::memcpy(&to, from, sizeof(Floats)); }
FOURFOLD_INLINE void write(const Floats& from, float* to) { std::memcpy(to, &from, sizeof(Floats)); }

FOURFOLD_INLINE void as_floats(const Ints& bits, Floats& to) { std::memcpy(&to, &bits, sizeof(Floats)); }

// x = 2^x within 1.6e-7 relatively, for x <= 126; 2^-126 below; a NaN stays one.
FOURFOLD_INLINE void raise_two(Floats& x) {
    const Floats bounded = x < -126.0f ? Floats{} - 126.0f : x;
    const Floats whole = (bounded + 12582912.0f) - 12582912.0f, part = bounded - whole;
    Floats sum = part * 0x1.5bba1ap-10f + 0x1.3cea88p-7f;
    sum = sum * part + 0x1.c6b752p-5f;
    sum = sum * part + 0x1.ebf9bcp-3f;
    sum = sum * part + 0x1.62e42ap-1f;
    sum = sum * part + 1.0f;
    const Floats number = x == x ? whole : Floats{};
    Floats power;
    as_floats((__builtin_convertvector(number, Ints) + 127) << 23, power);
    x = sum * power;
}

FOURFOLD_INLINE float raise_two(float x) {
    Floats all = Floats{} + x;
    raise_two(all);
    return all[0];
}

// A vector of stored elements.
FOURFOLD_INLINE void widen(const AttentionProblem& p, std::int64_t at, float* to) {
    Floats values;
    if (p.type == KVType::f32) {
        read(static_cast<const float*>(p.cache) + at, values);
    } else if (p.type == KVType::bf16) {
        Halves halves;
        std::memcpy(&halves, static_cast<const std::uint16_t*>(p.cache) + at, sizeof(halves));
        as_floats(__builtin_convertvector(halves, Ints) << 16, values);
    } else {
        // E4M3: seven bits moved in place, times 2^120, give subnormals too; the largest is NaN
        Bytes bytes;
        std::memcpy(&bytes, static_cast<const std::int8_t*>(p.cache) + at, sizeof(bytes));
        const Ints codes = __builtin_convertvector(bytes, Ints), size = codes & 0x7F;
        as_floats(size << 20, values);
        values *= 0x1p120f;
        values = size == 0x7F ? Floats{} + std::numeric_limits<float>::quiet_NaN() : values;
        values = codes < 0 ? -values : values;
    }
    write(values, to);
}

void pack_tile(const KeyTile& tile, void* packed) {
    const AttentionProblem& p = *tile.problem;
    const std::int64_t count = tile.end - tile.begin, padded = (count + kColumn - 1) / kColumn * kColumn;
    float* keys = static_cast<float*>(packed);
    float* values = keys + kTileKeys * p.head_dim;
    std::int64_t offsets[kTileKeys];
    key_offsets(tile, count, offsets);
    // where keys are missing the last stands in: its weight is zero there
    for (std::int64_t k = 0; k < padded; ++k)
        for (std::int64_t d = 0; d < p.head_dim; d += kLanes) {
            alignas(64) float part[kLanes];
            const std::int64_t at = offsets[k < count ? k : count - 1] + d;
            widen(p, at, part);
            float* column = keys + (k - k % kColumn) * p.head_dim + d * kColumn + k % kColumn;
            for (int i = 0; i < kLanes; ++i) column[i * kColumn] = part[i];
            widen(p, at + p.kv_heads * p.head_dim, values + k * p.head_dim + d);
        }
}

template <int R>
FOURFOLD_INLINE void score(const float* keys, std::int64_t head_dim, const float* query, Block& block,
                           std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; k += kColumn) {
        Floats sums[R][kParts] = {};
        for (std::int64_t d = 0; d < head_dim; ++d) {
            Floats key[kParts];
            for (int i = 0; i < kParts; ++i) read(keys + k * head_dim + d * kColumn + i * kLanes, key[i]);
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < kParts; ++i) sums[r][i] += key[i] * query[r * head_dim + d];
        }
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < kParts; ++i) write(sums[r][i], block.scores[r] + k + i * kLanes);
    }
}

FOURFOLD_INLINE void cap(const AttentionProblem& p, float scale, float* scores, std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; k += kLanes) {
        Floats s;
        read(scores + k, s);
        s *= scale / p.softcap * 2.0f * kLog2E;
        s = s > 60.0f ? Floats{} + 60.0f : s;
        raise_two(s);
        write(1.0f - 2.0f / (s + 1.0f), scores + k);
    }
}

// Scores of keys [begin, end) to weights, zeros beside them in [from, to); their maximum and sum are the row's tail.
FOURFOLD_INLINE void weigh(const KeyTile& tile, Block& block, int r, std::int64_t from, std::int64_t begin,
                           std::int64_t end, std::int64_t to) {
    const AttentionProblem& p = *tile.problem;
    float *scores = block.scores[r], *tail = block.parts[r] + p.head_dim;
    float scale = p.scale * (p.kv_scales ? p.kv_scales[tile.kv_head] : 1.0f);
    if (p.softcap > 0.0f) {
        cap(p, scale, scores, from, to);
        scale = p.softcap;
    }
    scale *= kLog2E;
    float peak = kNever;
    for (std::int64_t k = begin; k < end; ++k) peak = scores[k] > peak ? scores[k] : peak;
    peak *= scale;
    Floats total = {};
    for (std::int64_t k = from; k < to; k += kLanes) {
        Floats s;
        read(scores + k, s);
        s = s * scale - peak;
        raise_two(s);
        for (std::int64_t i = 0; i < kLanes; ++i)
            if (k + i < begin || k + i >= end) s[i] = 0.0f;
        total += s;
        write(s, scores + k);
    }
    tail[0] = peak;
    tail[1] = 0.0f;
    for (int i = 0; i < kLanes; ++i) tail[1] += total[i];
}

template <int R>
FOURFOLD_INLINE void sum_values(const float* values, std::int64_t head_dim, Block& block, std::int64_t begin,
                                std::int64_t end) {
    for (std::int64_t d = 0; d < head_dim; d += 16) {
        Floats sums[R][kParts] = {};
        for (std::int64_t k = begin; k < end; ++k) {
            Floats value[kParts];
            for (int i = 0; i < kParts; ++i) read(values + k * head_dim + d + i * kLanes, value[i]);
            for (int r = 0; r < R; ++r)
                for (int i = 0; i < kParts; ++i) sums[r][i] += value[i] * block.scores[r][k];
        }
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < kParts; ++i) write(sums[r][i], block.parts[r] + d + i * kLanes);
    }
}

// One function for tiles and for parts of a context, never inlined: the same bits from both.
__attribute__((noinline)) void merge(float* state, const float* part, std::int64_t head_dim) {
    const float most = state[head_dim] > part[head_dim] ? state[head_dim] : part[head_dim];
    if (part[head_dim] == kNever) return;
    const float kept = raise_two(state[head_dim] - most), added = raise_two(part[head_dim] - most);
    for (std::int64_t d = 0; d < head_dim; ++d) state[d] = state[d] * kept + part[d] * added;
    state[head_dim] = most;
    state[head_dim + 1] = state[head_dim + 1] * kept + part[head_dim + 1] * added;
}

template <int R>
FOURFOLD_INLINE void attend_block(const KeyTile& tile, const float* packed, const QueryRows& rows, std::int64_t row) {
    const AttentionProblem& p = *tile.problem;
    std::int64_t begin[R], end[R], from = kTileKeys, last = 0;
    for (int r = 0; r < R; ++r) {
        const std::int64_t position = rows.start + (row + r) / rows.group;
        const std::int64_t first = position - p.window + 1 - tile.begin;
        begin[r] = p.window && first > 0 ? first : 0;
        end[r] = (tile.end < position + 1 ? tile.end : position + 1) - tile.begin;
        from = begin[r] < from ? begin[r] : from;
        last = end[r] > last ? end[r] : last;
    }
    if (from >= last) return;
    from -= from % kColumn;
    const std::int64_t to = (last + kColumn - 1) / kColumn * kColumn;
    Block block;
    score<R>(packed, p.head_dim, static_cast<const float*>(rows.queries) + row * p.head_dim, block, from, to);
    for (int r = 0; r < R; ++r) weigh(tile, block, r, from, begin[r], end[r], to);
    sum_values<R>(packed + kTileKeys * p.head_dim, p.head_dim, block, from, last);
    for (int r = 0; r < R; ++r)
        merge(rows.states + (row + r) * (p.head_dim + kStateTail), block.parts[r], p.head_dim);
}

void attend(const KeyTile& tile, const void* packed, const QueryRows& rows) {
    const auto* floats = static_cast<const float*>(packed);
    std::int64_t row = 0;
    for (; row + kRowsTogether <= rows.count; row += kRowsTogether)
        attend_block<kRowsTogether>(tile, floats, rows, row);
    for (; row < rows.count; ++row) attend_block<1>(tile, floats, rows, row);
}

std::int64_t tile_bytes(std::int64_t head_dim) { return 2 * kTileKeys * head_dim * 4; }

std::int64_t query_bytes(std::int64_t head_dim) { return head_dim * 4; }

void pack_query(const float* q, std::int64_t head_dim, void* packed) {
    std::memcpy(packed, q, static_cast<std::size_t>(head_dim) * 4);
}

}  // namespace

const AttentionKernel FOURFOLD_ATTENTION_KERNEL = {tile_bytes, query_bytes, pack_query, pack_tile, attend, nullptr, merge};

}  // namespace fourfold
