// Attention in float32 by fused multiply-adds, for caches of every type: what is stored becomes float32 as a tile
// is packed.
#include <immintrin.h>

#include "attention_avx512_direct.h"
#include "attention_avx512_packed.h"

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

struct StoredFloat {
    using Arithmetic = Floats;
    static constexpr std::int64_t kBytes = 4;
    static __m512i load(const void* cache, std::int64_t a, std::int64_t b) {
        auto* from = static_cast<const float*>(cache);
        const __m256i low = _mm256_castps_si256(_mm256_loadu_ps(from + a));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_castps_si256(_mm256_loadu_ps(from + b)), 1);
    }
};

struct StoredBf16 {
    using Arithmetic = Floats;
    static constexpr std::int64_t kBytes = 2;
    static __m512i load(const void* cache, std::int64_t a, std::int64_t b) {
        auto* from = static_cast<const std::uint16_t*>(cache);
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + a));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + b));
        const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        return _mm512_slli_epi32(_mm512_cvtepu16_epi32(both), 16);
    }
};

struct StoredE4M3 {
    using Arithmetic = Floats;
    static constexpr std::int64_t kBytes = 1;
    // seven bits moved in place, times 2^120, give subnormals too; NaN is mended
    static __m512i load(const void* cache, std::int64_t a, std::int64_t b) {
        auto* from = static_cast<const std::uint8_t*>(cache);
        const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + a));
        const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + b));
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(low, high));
        const __m512i size = _mm512_and_si512(wide, _mm512_set1_epi32(0x7F));
        const __m512i sign = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(0x7F), wide), 24);
        __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(size, 20));
        value = _mm512_mul_ps(value, _mm512_set1_ps(0x1p120f));
        const __mmask16 nan = _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(0x7F));
        value = _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")));
        return _mm512_or_si512(_mm512_castps_si512(value), sign);
    }
};

std::int64_t tile_bytes(std::int64_t head_dim) { return 2 * kTileKeys * head_dim * 4; }

std::int64_t query_bytes(std::int64_t head_dim) { return head_dim * 4; }

void pack_query(const float* q, std::int64_t head_dim, void* packed) {
    for (std::int64_t d = 0; d < head_dim; d += 16)
        _mm512_storeu_ps(static_cast<float*>(packed) + d, _mm512_loadu_ps(q + d));
}

template <class S>
constexpr AttentionKernel kernel() {
    return {tile_bytes, query_bytes, pack_query, pack<S>, attend_rows<typename S::Arithmetic>,
            attend_direct<S>, merge_states};
}

}  // namespace

const AttentionKernel kAttentionAvx512[3] = {
    kernel<StoredBf16>(),
    kernel<StoredFloat>(),
    kernel<StoredE4M3>(),
};

}  // namespace fourfold
