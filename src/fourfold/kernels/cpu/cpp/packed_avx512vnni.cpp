// Integer dot products of AVX-512 VNNI: 16 rows of W times four values of x in one instruction.
//
// vpdpbusd multiplies unsigned by signed bytes, so weights carry 128 more than they are worth and each sum starts at
// -128 times the sum of x. E2M1 is doubled to be an integer; one byte shuffle turns 64 nibbles into 64 such bytes.
#include <immintrin.h>

#include <cstring>

#include "packed_avx512.h"

namespace fourfold {
namespace {

inline __m512i broadcast4(const std::int8_t* bytes) {
    std::int32_t four;
    std::memcpy(&four, bytes, 4);
    return _mm512_set1_epi32(four);
}

// The scales of 16 rows in a block, 2^e. A sum s arrives as the bits of 1.5 * 2^23 + s, to which e is added in the
// exponent, and 1.5 * 2^23 * 2^e is taken off: s * 2^e exactly, on units that the dot products leave idle. That would
// overflow for the largest scales, and NaN is none, so a block that has either goes the plain way.
struct Scales {
    __m512i shift;
    __m512 offset, plain;
    bool large;

    Scales(const std::uint8_t* bytes, int unit) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
        shift = _mm512_slli_epi32(_mm512_sub_epi32(wide, _mm512_set1_epi32(127 - unit)), 23);
        offset = _mm512_castsi512_ps(_mm512_add_epi32(shift, _mm512_set1_epi32(kRoundBits)));
        large = _mm512_cmpgt_epi32_mask(wide, _mm512_set1_epi32(224)) != 0;
        if (__builtin_expect(large, 0)) plain = plain_scales(wide, unit);
    }

    static __m512 plain_scales(__m512i wide, int unit) {
        const __mmask16 nan = _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255));
        const __m512 e = _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(127 - unit)));
        return _mm512_mask_mov_ps(_mm512_scalef_ps(_mm512_set1_ps(1.0f), e), nan, _mm512_set1_ps(__builtin_nanf("")));
    }

    // `bits` are those of 1.5 * 2^23 + s and `shift` added up
    __m512 add(__m512i bits, float x_scale, __m512 sum) const {
        const __m512 scaled = _mm512_sub_ps(_mm512_castsi512_ps(bits), offset);
        return _mm512_fmadd_ps(scaled, _mm512_set1_ps(x_scale), sum);
    }

    __m512 add_plain(__m512i dot, float x_scale, __m512 sum) const {
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(plain, _mm512_set1_ps(x_scale)), sum);
    }
};

// kRoundBits + `from` + the sum over a block, in two chains for their latency.
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
        sums[i] = add(dot_block(codes, block, from), block.half_scale, sums[i]);
    }
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
        if (__builtin_expect(scale.large, 0))
            each_row(codes, _mm512_set1_epi32(-kRoundBits), x, stride, sums,
                     [&](auto... operands) { return scale.add_plain(operands...); });
        else
            each_row(codes, scale.shift, x, stride, sums, [&](auto... operands) { return scale.add(operands...); });
    }
};

inline void prepare_block(const float* x, Int8Block& to) {
    const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    const __m512i largest = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                             _mm512_and_si512(_mm512_castps_si512(high), magnitude));
    const std::int32_t bits = _mm512_reduce_max_epi32(largest);  // a NaN is larger than Inf, and Inf than all else
    const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    const bool usable = bits < 0x7F800000 && amax >= 0x1p-100f;
    const __m512 inverse = _mm512_set1_ps(usable ? 127.0f / amax : 0.0f);
    const __mmask16 keep = static_cast<__mmask16>(usable ? 0xFFFF : 0);  // Inf times 0 is no code
    const __m128i first = _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(low, inverse)));
    const __m128i last = _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(high, inverse)));
    const __m256i codes = _mm256_set_m128i(last, first);
    const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(-128), codes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.codes), codes);
    to.half_scale = usable ? amax / 127.0f * 0.5f : bits >= 0x7F800000 ? __builtin_nanf("") : 0.0f;
    to.start = kRoundBits - _mm512_reduce_add_epi32(_mm512_zextsi256_si512(sums));
}

}  // namespace

void packed_int8_avx512(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    if (call.weight.kind == WeightKind::int8) all_rows<Dot<Int8>>(call, tile_begin, tile_end);
    else all_rows<Dot<Mxfp4>>(call, tile_begin, tile_end);
}

void prepare_int8_avx512(const float* x, std::int64_t k, void* row) {
    for (std::int64_t b = 0; b < k / kPackedBlock; ++b)
        prepare_block(x + b * kPackedBlock, static_cast<Int8Block*>(row)[b]);
}

}  // namespace fourfold
