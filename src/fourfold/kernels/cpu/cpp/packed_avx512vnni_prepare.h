// x in int8: a block by itself, or sixteen whose scales are worked out side by side.
#pragma once

#include <immintrin.h>

#include "packed_layout.h"

namespace fourfold {
namespace {

inline void prepare_block(const float* x, Int8Block& to) {
    const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const __m512i largest = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                             _mm512_and_si512(_mm512_castps_si512(high), magnitude));
    const std::int32_t bits = _mm512_reduce_max_epi32(largest);  // a NaN is larger than Inf, and Inf than all else
    const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    const __m512 inverse = _mm512_set1_ps(set_scale(amax, to));
    const __mmask16 keep = _mm512_cmp_ps_mask(inverse, _mm512_setzero_ps(), _CMP_GT_OQ);  // Inf times 0 is no code
    const __m128i first = _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(low, inverse)));
    const __m128i last = _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(high, inverse)));
    const __m256i codes = _mm256_set_m128i(last, first);
    const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(-128), codes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.codes), codes);
    to.start = -_mm512_reduce_add_epi32(_mm512_zextsi256_si512(sums));
}

// Lane i: all lanes of v[i] by `op`.
template <typename Op>
inline __m512i each_reduced(const __m512i (&v)[16], Op op) {
    __m512i four[4];
    for (int i = 0; i < 4; ++i) {
        const __m512i *w = v + 4 * i, low = op(_mm512_unpacklo_epi32(w[0], w[1]), _mm512_unpackhi_epi32(w[0], w[1])),
                      high = op(_mm512_unpacklo_epi32(w[2], w[3]), _mm512_unpackhi_epi32(w[2], w[3]));
        four[i] = op(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    }
    __m512i two[2];
    for (int i = 0; i < 2; ++i)
        two[i] = op(_mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0x44),
                    _mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0xEE));
    return op(_mm512_shuffle_i32x4(two[0], two[1], 0x88), _mm512_shuffle_i32x4(two[0], two[1], 0xDD));
}

// set_scale for sixteen blocks: what follows the codes of each, and 1 / scale.
struct SixteenScales {
    __m512 half_scale, exponent, inverse;
    __m512i shift;
    __mmask16 usable;

    explicit SixteenScales(__m512i largest) {
        const __m512 amax = _mm512_castsi512_ps(largest), infinite = _mm512_set1_ps(__builtin_inff());
        const __mmask16 finite = _mm512_cmp_ps_mask(amax, infinite, _CMP_LT_OQ);
        usable = _mm512_mask_cmp_ps_mask(finite, amax, _mm512_set1_ps(0x1p-60f), _CMP_GE_OQ);
        const __m512 least = _mm512_div_ps(amax, _mm512_set1_ps(127.0f));
        const __m512i bits = _mm512_sub_epi32(_mm512_castps_si512(least), _mm512_set1_epi32(1));
        const __m512i eighths = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(7));
        const __m512i shifts = _mm512_setr_epi32(3, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
        const __m512 factors = _mm512_setr_ps(9, 5, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2);
        shift = _mm512_maskz_permutexvar_epi32(usable, eighths, shifts);
        const __m512i power = _mm512_sub_epi32(_mm512_srli_epi32(bits, 23), _mm512_set1_epi32(128));
        const __m512 none = _mm512_mask_mov_ps(_mm512_set1_ps(__builtin_nanf("")), finite, _mm512_setzero_ps());
        exponent = _mm512_mask_cvtepi32_ps(none, usable, _mm512_sub_epi32(power, shift));
        half_scale = _mm512_mask_scalef_ps(none, usable, _mm512_permutexvar_ps(eighths, factors), exponent);
        inverse = _mm512_maskz_div_ps(usable, _mm512_set1_ps(0.5f), half_scale);
    }

    // `sums` of the codes
    void store(__m512i sums, Int8Block* to) const {
        const __m512i start = _mm512_maskz_sub_epi32(usable, _mm512_setzero_si512(), _mm512_slli_epi32(sums, 7));
        const __m512i a = _mm512_castps_si512(half_scale), b = _mm512_castps_si512(exponent);
        const __m512i ab[2] = {_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)};
        const __m512i cd[2] = {_mm512_unpacklo_epi32(shift, start), _mm512_unpackhi_epi32(shift, start)};
        for (int i = 0; i < 4; ++i) {
            const __m512i low = _mm512_unpacklo_epi64(ab[i / 2], cd[i / 2]);
            const __m512i four = i % 2 ? _mm512_unpackhi_epi64(ab[i / 2], cd[i / 2]) : low;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(&to[i].half_scale), _mm512_extracti32x4_epi32(four, 0));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(&to[i + 4].half_scale), _mm512_extracti32x4_epi32(four, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(&to[i + 8].half_scale), _mm512_extracti32x4_epi32(four, 2));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(&to[i + 12].half_scale), _mm512_extracti32x4_epi32(four, 3));
        }
    }
};

inline void prepare_blocks(const float* x, Int8Block* to) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const auto part = [x](int i) { return _mm512_castps_si512(_mm512_loadu_ps(x + 16 * i)); };
    __m512i v[16];
    for (int i = 0; i < 16; ++i)
        v[i] = _mm512_max_epi32(_mm512_and_si512(part(2 * i), magnitude), _mm512_and_si512(part(2 * i + 1), magnitude));
    const SixteenScales scales(each_reduced(v, [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); }));
    float inverse[16];
    _mm512_storeu_ps(inverse, scales.inverse);
    for (int i = 0; i < 16; ++i) {
        const __m512 factor = _mm512_set1_ps(inverse[i]);
        const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(part(2 * i)), factor));
        const __m512i high = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(part(2 * i + 1)), factor));
        v[i] = _mm512_add_epi32(low, high);
        // Inf times 0 becomes the lowest integer, whose last byte is 0
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to[i].codes), _mm512_cvtepi32_epi8(low));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to[i].codes + 16), _mm512_cvtepi32_epi8(high));
    }
    scales.store(each_reduced(v, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }), to);
}

}  // namespace
}  // namespace fourfold
