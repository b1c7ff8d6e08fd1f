// int8 for up to 16 rows of x: a block of a tile is decoded to registers, where it meets all of them.
#pragma once

#include <immintrin.h>

#include "packed_avx512.h"
#include "packed_avx512vnni.h"

namespace fourfold {
namespace {

// A float of 1.5 * 2^23, whose last bit is worth 1: kRoundBits + s are the bits of 1.5 * 2^23 + s.
constexpr std::int32_t kRoundBits = 0x4B400000;

// As add_scaled, in fewer instructions: a sum s arrives as the bits of 1.5 * 2^23 + s, to which e is added
// in the exponent, and 1.5 * 2^23 * 2^e is taken off: s * 2^e exactly. That would overflow for the largest scales, lose
// bits of products with the smallest ones, and NaN is none, so a block that has any of these goes the other way.
struct Scales {
    __m512i shift;
    __m512 offset;
    bool plain;

    Scales(const std::uint8_t* bytes, int unit) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
        shift = _mm512_slli_epi32(_mm512_sub_epi32(wide, _mm512_set1_epi32(127 - unit)), 23);
        offset = _mm512_castsi512_ps(_mm512_add_epi32(shift, _mm512_set1_epi32(kRoundBits)));
        plain = _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(wide, _mm512_set1_epi32(80)), _mm512_set1_epi32(144)) != 0;
    }

    // `bits` are those of 1.5 * 2^23 + s and `shift` added up
    __m512 add(__m512i bits, const Int8Block& x, __m512 sum) const {
        const __m512 scaled = _mm512_sub_ps(_mm512_castsi512_ps(bits), offset);
        return _mm512_fmadd_ps(scaled, _mm512_set1_ps(x.half_scale), sum);
    }
};

// `from` + the sum over a block, in two chains for their latency.
inline __m512i dot_block(const __m512i (&codes)[8], const Int8Block& x, __m512i from) {
    __m512i first = _mm512_set1_epi32(x.start);
    for (int g = 0; g < 4; ++g) {
        first = _mm512_dpbusd_epi32(first, codes[g], broadcast4(x.codes + 4 * g));
        from = _mm512_dpbusd_epi32(from, codes[g + 4], broadcast4(x.codes + 4 * g + 16));
    }
    return _mm512_add_epi32(first, from);
}

template <int MR, typename Add>
inline void each_row(const __m512i (&codes)[8], __m512i from, const char* x, std::int64_t stride, __m512 (&sums)[MR],
                     Add add) {
    for (int i = 0; i < MR; ++i) {
        const auto& block = *reinterpret_cast<const Int8Block*>(x + i * stride);
        sums[i] = add(dot_block(codes, block, from), block, sums[i]);
    }
}

template <typename Weight>
struct Dot : Weight {
    static constexpr Arithmetic kArithmetic = Arithmetic::int8;
    static constexpr std::int64_t kStep = sizeof(Int8Block);
    static constexpr int kMostRows = 16;

    template <int MR>
    void add_block(const std::uint8_t* block, const std::uint8_t* scale_bytes, const char* x, std::int64_t stride,
                   __m512 (&sums)[MR]) const {
        __m512i codes[8];
        this->decode(block, codes);
        const Scales scale(scale_bytes, Weight::kUnit);
        if (__builtin_expect(scale.plain, 0)) {
            const __m512 e = exponents(scale_bytes, Weight::kUnit);
            each_row(codes, _mm512_setzero_si512(), x, stride, sums,
                     [&](__m512i dot, const Int8Block& x, __m512 sum) { return add_scaled(dot, x, e, sum); });
        } else {
            each_row(codes, _mm512_castps_si512(scale.offset), x, stride, sums,
                     [&](auto... operands) { return scale.add(operands...); });
        }
    }
};

}  // namespace
}  // namespace fourfold
