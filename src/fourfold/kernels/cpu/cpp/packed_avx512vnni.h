// Integer dot products of AVX-512 VNNI: 16 rows of W times four values of x in one instruction.
//
// vpdpbusd multiplies unsigned by signed bytes, so weights carry 128 more than they are worth and each sum starts at
// -128 times the sum of x. E2M1 is doubled to be an integer; one byte shuffle turns 64 nibbles into 64 such bytes.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "packed_layout.h"

namespace fourfold {
namespace {

inline __m512i broadcast4(const std::int8_t* bytes) {
    std::int32_t four;
    std::memcpy(&four, bytes, 4);
    return _mm512_set1_epi32(four);
}

// The scales of 16 rows of W in a block as exponents, of which byte 255 has none.
inline __m512 exponents(const std::uint8_t* bytes, int unit) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255));
    const __m512 e = _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(127 - unit)));
    return _mm512_mask_mov_ps(e, nan, _mm512_set1_ps(__builtin_nanf("")));
}

// Adds a block's sums times their scales. Nothing here needs the units that multiply.
inline __m512 add_scaled(__m512i dot, const Int8Block& x, __m512 exponents, __m512 sum) {
    const __m512i scaled = _mm512_add_epi32(dot, _mm512_sllv_epi32(dot, _mm512_set1_epi32(x.shift)));
    const __m512 e = _mm512_add_ps(exponents, _mm512_set1_ps(x.exponent));
    return _mm512_add_ps(sum, _mm512_scalef_ps(_mm512_cvtepi32_ps(scaled), e));
}

struct Mxfp4 {
    static constexpr WeightKind kKind = WeightKind::mxfp4;
    static constexpr int kUnit = 0;
    __m512i table = _mm512_broadcast_i32x4(
        _mm_setr_epi8(-128, -127, -126, -125, -124, -122, -120, -116, -128, 127, 126, 125, 124, 122, 120, 116));
    __m512i low = _mm512_set1_epi8(15);

    void decode(const std::uint8_t* block, __m512i (&codes)[8]) const {
        for (int j = 0; j < 4; ++j) {
            const __m512i bytes = _mm512_load_si512(block + 64 * j);
            codes[j] = _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, low));
            codes[j + 4] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low));
        }
    }
};

struct Int8 {
    static constexpr WeightKind kKind = WeightKind::int8;
    static constexpr int kUnit = -5;  // codes are worth 1/64; the others half of what they are held as

    void decode(const std::uint8_t* block, __m512i (&codes)[8]) const {
        for (int j = 0; j < 8; ++j) codes[j] = _mm512_load_si512(block + 64 * j);
    }
};

}  // namespace
}  // namespace fourfold
