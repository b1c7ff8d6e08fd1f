// bfloat16 dot products: 16 rows of W times two values of x in one instruction, sums in float32.
//
// Codes of E2M1 and of int8 are bfloat16s, so what is multiplied is exactly what the weight holds. vdpbf16ps takes
// subnormal factors and sums, below 1.2e-38, as zero: bfloat16 weights or inputs that small count for nothing.
#include "packed_avx512.h"

#include <cstring>

#include "avx512_bf16.h"

namespace fourfold {
namespace {

inline __m512bh broadcast_pair(const std::uint16_t* values) {
    std::int32_t pair;
    std::memcpy(&pair, values, 4);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

// 2^(byte - 127 + unit) of 16 rows; byte 255 is NaN.
inline __m512 decode_scales(const std::uint8_t* bytes, int unit) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(wide, _mm512_set1_epi32(255));
    const __m512 e = _mm512_cvtepi32_ps(_mm512_add_epi32(wide, _mm512_set1_epi32(unit - 127)));
    return _mm512_mask_mov_ps(_mm512_scalef_ps(_mm512_set1_ps(1.0f), e), nan, _mm512_set1_ps(__builtin_nanf("")));
}

// A word's lowest four bits are one nibble after the other as it is shifted; a permute of words looks at five.
struct Mxfp4 {
    static constexpr WeightKind kKind = WeightKind::mxfp4;
    __m512i table;

    Mxfp4() {
        alignas(32) static const std::uint16_t codes[16] = {0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040,
                                                            0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0,
                                                            0xC000, 0xC040, 0xC080, 0xC0C0};
        table = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(codes)));
    }

    void decode(const std::uint8_t* block, __m512bh (&codes)[16]) const {
        for (int j = 0; j < 4; ++j) {
            const __m512i words = _mm512_load_si512(block + 64 * j);
            codes[2 * j] = look_up(words);
            codes[2 * j + 8] = look_up(_mm512_srli_epi16(words, 4));
            codes[2 * j + 1] = look_up(_mm512_srli_epi16(words, 8));
            codes[2 * j + 9] = look_up(_mm512_srli_epi16(words, 12));
        }
    }

    __m512bh look_up(__m512i words) const {
        return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(words, table));
    }

    static __m512 scales(const std::uint8_t* bytes) { return decode_scales(bytes, 0); }
};

struct Int8 {
    static constexpr WeightKind kKind = WeightKind::int8;

    void decode(const std::uint8_t* block, __m512bh (&codes)[16]) const {
        for (int j = 0; j < 8; ++j) {
            const __m512i bytes = _mm512_xor_si512(_mm512_load_si512(block + 64 * j), _mm512_set1_epi8(-128));
            codes[2 * j] = pair(_mm512_slli_epi32(bytes, 24), _mm512_slli_epi32(bytes, 8));
            codes[2 * j + 1] = pair(_mm512_slli_epi32(bytes, 16), bytes);
        }
    }

    // The upper bytes as integers; a float32 of at most eight bits is a bfloat16 and zeros.
    static __m512bh pair(__m512i first, __m512i second) {
        const __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(first, 24)));
        const __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(second, 24)));
        return reinterpret_cast<__m512bh>(_mm512_or_si512(_mm512_srli_epi32(low, 16), high));
    }

    static __m512 scales(const std::uint8_t* bytes) { return decode_scales(bytes, -6); }
};

struct Bf16 {
    static constexpr WeightKind kKind = WeightKind::bf16;

    void decode(const std::uint8_t* block, __m512bh (&codes)[16]) const {
        for (int j = 0; j < 16; ++j) codes[j] = reinterpret_cast<__m512bh>(_mm512_load_si512(block + 64 * j));
    }

    static __m512 scales(const std::uint8_t*) { return _mm512_set1_ps(1.0f); }
};

template <typename Weight>
struct Dot : Weight {
    static constexpr Arithmetic kArithmetic = Arithmetic::exact;
    static constexpr std::int64_t kStep = sizeof(Bf16Block);
    static constexpr int kMostRows = 12;

    template <int MR>
    void add_block(const std::uint8_t* block, const std::uint8_t* scale_bytes, const char* x, std::int64_t stride,
                   __m512 (&sums)[MR]) const {
        __m512bh codes[16];
        this->decode(block, codes);
        const __m512 scale = Weight::scales(scale_bytes);
        for (int i = 0; i < MR; ++i) {
            const auto* values = reinterpret_cast<const Bf16Block*>(x + i * stride)->values;
            __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();  // two chains, for their latency
            for (int j = 0; j < 8; ++j) {
                first = _mm512_dpbf16_ps(first, codes[j], broadcast_pair(values + 2 * j));
                second = _mm512_dpbf16_ps(second, codes[j + 8], broadcast_pair(values + 2 * j + 16));
            }
            sums[i] = _mm512_fmadd_ps(_mm512_add_ps(first, second), scale, sums[i]);
        }
    }
};

}  // namespace

void packed_exact_avx512(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    switch (call.weight.kind) {
        case WeightKind::mxfp4: return all_rows<Dot<Mxfp4>>(call, tile_begin, tile_end);
        case WeightKind::int8: return all_rows<Dot<Int8>>(call, tile_begin, tile_end);
        case WeightKind::bf16: return all_rows<Dot<Bf16>>(call, tile_begin, tile_end);
    }
}

void prepare_exact_avx512(const float* x, std::int64_t k, void* row) {
    for (std::int64_t i = 0; i < blocks_of(k) * kPackedBlock; i += 16) {
        const __mmask16 held = static_cast<__mmask16>(i + 16 <= k ? 0xFFFF : i < k ? (1u << (k - i)) - 1 : 0);
        const __m256i values = to_bf16(_mm512_maskz_loadu_ps(held, x + i));
        const __m256i ordered = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(values, 0xD8), 0xD8);
        _mm256_store_si256(reinterpret_cast<__m256i*>(static_cast<std::uint16_t*>(row) + i), ordered);
    }
}

}  // namespace fourfold
