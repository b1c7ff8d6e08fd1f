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
    static __m512i load(const void* cache, std::int64_t a, std::int64_t b) {
        auto* from = static_cast<const std::uint16_t*>(cache);
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + a));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + b));
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
};

struct StoredE4M3 {
    using Arithmetic = Bf16Pairs;
    static constexpr std::int64_t kBytes = 1;
    // Sign, exponent and mantissa move in place; then 120 is added to the exponent, but where it is 0 what the
    // subnormals, 0 to 7 of 2^-9, lack. NaN is rare, and mended when it is there.
    static __m512i decode(__m256i codes) {
        alignas(16) static const std::uint16_t lacking[8] = {0x0000,        0x3B00 - 0x10, 0x3B80 - 0x20,
                                                             0x3BC0 - 0x30, 0x3C00 - 0x40, 0x3C20 - 0x50,
                                                             0x3C40 - 0x60, 0x3C60 - 0x70};
        const __m512i wide = _mm512_cvtepi8_epi16(codes);
        const __m512i kept = _mm512_set1_epi16(static_cast<short>(0x87F0));
        const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(wide, 4), kept);
        const __mmask32 small = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x78));
        const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(lacking)));
        const __m512i raise = _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(120 << 7), small, wide, table);
        const __m512i value = _mm512_add_epi16(moved, raise);
        const __m256i size = _mm256_and_si256(codes, _mm256_set1_epi8(0x7F));
        const __mmask32 nan = _mm256_cmpeq_epi8_mask(size, _mm256_set1_epi8(0x7F));
        if (__builtin_expect(nan == 0, 1)) return value;
        return _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7FC0));
    }
    static __m512i load(const void* cache, std::int64_t a, std::int64_t b) {
        auto* from = static_cast<const std::uint8_t*>(cache);
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + a));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + b));
        return decode(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
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
