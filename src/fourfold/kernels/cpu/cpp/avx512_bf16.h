// float32 to bf16 with AVX-512F alone, nearest even; a NaN stays a NaN and a subnormal stays what it is (the
// processor's own conversion would make it zero). For files that are compiled for AVX-512, each with its own copy.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fourfold {
namespace {

inline __m256i to_bf16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline void store_bf16(void* out, std::int64_t index, float value) {
    __m128i half = _mm256_castsi256_si128(to_bf16(_mm512_set1_ps(value)));
    static_cast<std::uint16_t*>(out)[index] = static_cast<std::uint16_t>(_mm_extract_epi16(half, 0));
}

}  // namespace
}  // namespace fourfold
