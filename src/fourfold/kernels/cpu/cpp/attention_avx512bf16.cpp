// Attention by bf16 dot products, for caches of bf16 and E4M3 (whose codes are exact in bf16).
//
// Queries and weights are rounded to bf16, as torch's bf16 attention does; products are summed in float32, and the
// sum of weights is taken before they are rounded. The price: subnormal numbers (below 1.2e-38) count as zero.
#include <immintrin.h>

#include "attention_avx512_direct.h"
#include "attention_avx512_packed.h"

namespace fourfold {
namespace {

struct Bf16Pairs {
    static constexpr int kPer = 2;
    static __m512 dot(__m512 sum, __m512 a, __m512 b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static void store_weights(float* to, __m512 low, __m512 high) {
        _mm512_store_ps(to, reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(high, low)));
    }
};

struct StoredBf16 {
    using Arithmetic = Bf16Pairs;
    static constexpr std::int64_t kBytes = 2;
    static __m512i load(const void* cache, std::int64_t at) {
        return _mm512_loadu_si512(static_cast<const std::uint16_t*>(cache) + at);
    }
    static __m512i load_half(const void* cache, std::int64_t at) {
        auto* from = reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(cache) + at);
        return _mm512_zextsi256_si512(_mm256_loadu_si256(from));
    }
};

struct StoredE4M3 {
    using Arithmetic = Bf16Pairs;
    static constexpr std::int64_t kBytes = 1;
    // Exponent and mantissa move in place, which leaves the subnormals, 0 to 7 of 2^-9, and NaN to mend.
    static __m512i decode(__m512i codes) {
        alignas(16) static const std::uint16_t small[8] = {0x0000, 0x3B00, 0x3B80, 0x3BC0,
                                                           0x3C00, 0x3C20, 0x3C40, 0x3C60};
        const __m512i smallest = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(small)));
        const __m512i size = _mm512_and_si512(codes, _mm512_set1_epi16(0x7F));
        const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(_mm512_set1_epi16(0x7F), codes), 8);
        __m512i value = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
        const __mmask32 subnormal = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
        value = _mm512_mask_permutexvar_epi16(value, subnormal, size, smallest);
        const __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7F));
        value = _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7FC0));
        return _mm512_or_si512(value, sign);
    }
    static __m512i load(const void* cache, std::int64_t at) {
        auto* from = reinterpret_cast<const __m256i*>(static_cast<const std::uint8_t*>(cache) + at);
        return decode(_mm512_cvtepu8_epi16(_mm256_loadu_si256(from)));
    }
    static __m512i load_half(const void* cache, std::int64_t at) {
        auto* from = reinterpret_cast<const __m128i*>(static_cast<const std::uint8_t*>(cache) + at);
        return decode(_mm512_cvtepu8_epi16(_mm256_zextsi128_si256(_mm_loadu_si128(from))));
    }
};

std::int64_t tile_bytes(std::int64_t head_dim) { return 2 * kTileKeys * head_dim * 2; }

std::int64_t query_bytes(std::int64_t head_dim) { return head_dim * 2; }

void pack_query(const float* q, std::int64_t head_dim, void* packed) {
    auto* to = static_cast<std::uint16_t*>(packed);
    for (std::int64_t d = 0; d < head_dim; d += 16) {
        const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(q + d));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), reinterpret_cast<__m256i>(half));
    }
}

template <class S>
constexpr AttentionKernel kernel() {
    return {tile_bytes, query_bytes, pack_query, pack<S>, attend_rows<typename S::Arithmetic>,
            attend_direct<S>, merge_states};
}

}  // namespace

const AttentionKernel kAttentionAvx512Bf16[3] = {
    kernel<StoredBf16>(),
    {},
    kernel<StoredE4M3>(),
};

}  // namespace fourfold
