// Rounding keys and values into the cache with AVX-512, sixteen at a time; the same bits as the portable code.
#include <immintrin.h>

#include "avx512_bf16.h"
#include "kv_write.h"

namespace fourfold {
namespace {

inline __mmask16 first(std::int64_t count) { return count >= 16 ? 0xFFFF : static_cast<__mmask16>((1 << count) - 1); }

// As to_e4m3 of kv_write.cpp: below 2^-6 adding 2^14 rounds to multiples of 2^-9, above it the bits are rounded.
inline __m128i to_e4m3(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value), low = _mm512_set1_epi32(0x7FFFFFFF);
    const __m512i sign = _mm512_srli_epi32(_mm512_andnot_si512(low, bits), 24);
    const __m512 size = _mm512_min_ps(_mm512_castsi512_ps(_mm512_and_si512(bits, low)), _mm512_set1_ps(448.0f));
    __m512i code = _mm512_castps_si512(size);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(code, 20), _mm512_set1_epi32(1));
    code = _mm512_add_epi32(code, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFFF)));
    code = _mm512_sub_epi32(_mm512_srli_epi32(code, 20), _mm512_set1_epi32(120 << 3));
    const __mmask16 small = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
    const __m512i raised = _mm512_castps_si512(_mm512_add_ps(size, _mm512_set1_ps(0x1p14f)));
    code = _mm512_mask_and_epi32(code, small, raised, _mm512_set1_epi32(0xF));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    code = _mm512_mask_mov_epi32(code, nan, _mm512_set1_epi32(0x7F));
    return _mm512_cvtepi32_epi8(_mm512_or_si512(code, sign));
}

}  // namespace

void write_bf16_avx512(const float* from, std::int64_t count, float, void* to) {
    for (std::int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = first(count - i);
        const __m256i half = to_bf16(_mm512_maskz_loadu_ps(mask, from + i));
        _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(to) + i, mask, half);
    }
}

void write_e4m3_avx512(const float* from, std::int64_t count, float scale, void* to) {
    for (std::int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = first(count - i);
        const __m512 value = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, from + i), _mm512_set1_ps(scale));
        _mm_mask_storeu_epi8(static_cast<std::uint8_t*>(to) + i, mask, to_e4m3(value));
    }
}

}  // namespace fourfold
