// Which form of the integer products takes a call, and the rounding of x.
#include "packed_avx512vnni_few.h"
#include "packed_avx512vnni_many.h"

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

template <typename Weight>
void rows_of(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    if (call.m <= Dot<Weight>::kMostRows) all_rows<Dot<Weight>>(call, tile_begin, tile_end);
    else many_rows<Weight>(call, tile_begin, tile_end);
}

}  // namespace

void packed_int8_avx512(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    if (call.weight.kind == WeightKind::int8) rows_of<Int8>(call, tile_begin, tile_end);
    else rows_of<Mxfp4>(call, tile_begin, tile_end);
}

void prepare_int8_avx512(const float* x, std::int64_t k, void* row) {
    for (std::int64_t b = 0; b < k / kPackedBlock; ++b)
        prepare_block(x + b * kPackedBlock, static_cast<Int8Block*>(row)[b]);
}

}  // namespace fourfold
