// Attention in float32 by fused multiply-adds, for caches of every type: what is stored becomes float32 as a tile
// is packed.
#include <immintrin.h>

#include "attention_avx512.h"

namespace fourfold {
namespace {

struct Floats {
    static constexpr int kPer = 1;
    static __m512 dot(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
    static void store_weights(float* to, __m512 low, __m512 high) {
        _mm512_store_ps(to, low);
        _mm512_store_ps(to + 16, high);
    }
};

// E4M3 to float32: seven bits moved in place, times 2^120, give subnormals too; NaN is mended.
inline __m512 from_e4m3(__m128i codes) {
    const __m512i wide = _mm512_cvtepu8_epi32(codes);
    const __m512i size = _mm512_and_si512(wide, _mm512_set1_epi32(0x7F));
    const __m512i sign = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(0x7F), wide), 24);
    __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(size, 20));
    value = _mm512_mul_ps(value, _mm512_set1_ps(0x1p120f));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(0x7F));
    value = _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")));
    return _mm512_or_ps(value, _mm512_castsi512_ps(sign));
}

inline __m512 load(const AttentionProblem& p, std::int64_t at) {
    if (p.type == KVType::f32) return _mm512_loadu_ps(static_cast<const float*>(p.cache) + at);
    if (p.type == KVType::fp8)
        return from_e4m3(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const std::uint8_t*>(p.cache) + at)));
    const __m256i half =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(p.cache) + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

void pack_tile(const KeyTile& tile, void* packed) {
    const AttentionProblem& p = *tile.problem;
    const std::int64_t count = tile.end - tile.begin, padded = (count + 31) / 32 * 32;
    std::int64_t offsets[kTileKeys];
    key_offsets(tile, offsets);
    float* keys = static_cast<float*>(packed);
    for (std::int64_t k = 0; k < padded; k += kColumn)
        for (std::int64_t d = 0; d < p.head_dim; d += 16, keys += 16 * kColumn) {
            __m512i rows[16];
            for (int i = 0; i < 16; ++i)
                rows[i] = k + i < count ? _mm512_castps_si512(load(p, offsets[k + i] + d)) : _mm512_setzero_si512();
            transpose(rows);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(keys + i * kColumn, rows[i]);
        }
    float* values = static_cast<float*>(packed) + kTileKeys * p.head_dim;
    for (std::int64_t k = 0; k < padded; ++k)
        for (std::int64_t d = 0; d < p.head_dim; d += 16, values += 16)
            _mm512_store_ps(values,
                            k < count ? load(p, offsets[k] + p.kv_heads * p.head_dim + d) : _mm512_setzero_ps());
}

std::int64_t tile_bytes(std::int64_t head_dim) { return 2 * kTileKeys * head_dim * 4; }

std::int64_t query_bytes(std::int64_t head_dim) { return head_dim * 4; }

void pack_query(const float* q, std::int64_t head_dim, void* packed) {
    for (std::int64_t d = 0; d < head_dim; d += 16)
        _mm512_storeu_ps(static_cast<float*>(packed) + d, _mm512_loadu_ps(q + d));
}

}  // namespace

const AttentionKernel kAttentionAvx512 = {tile_bytes, query_bytes, pack_query, pack_tile, attend_rows<Floats>,
                                          merge_states};

}  // namespace fourfold
