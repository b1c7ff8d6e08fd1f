// Attention by bf16 dot products, for caches of bf16 and E4M3 (whose codes are exact in bf16).
//
// Queries and weights are rounded to bf16, as torch's bf16 attention does; products are summed in float32, and the
// sum of weights is taken before they are rounded. The price: subnormal numbers (below 1.2e-38) count as zero.
#include <immintrin.h>

#include "attention_avx512.h"

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

struct Stored16 {
    static __m512i load32(const void* cache, std::int64_t at) {
        return _mm512_loadu_si512(static_cast<const std::uint16_t*>(cache) + at);
    }
    static __m512i load16(const void* cache, std::int64_t at) {
        return _mm512_zextsi256_si512(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const std::uint16_t*>(cache) + at)));
    }
    static void fetch(const void* cache, std::int64_t at) {
        _mm_prefetch(static_cast<const std::uint16_t*>(cache) + at, _MM_HINT_T0);
    }
    static constexpr std::int64_t kLine = 32;
};

struct StoredE4M3 {
    // Exponent and mantissa move in place, which leaves the subnormals, 0 to 7 of 2^-9, and NaN to mend.
    static __m512i decode(__m512i codes) {
        alignas(64) static const std::uint16_t small[32] = {0x0000, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60,
                                                            0x0000, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60,
                                                            0x0000, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60,
                                                            0x0000, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60};
        const __m512i size = _mm512_and_si512(codes, _mm512_set1_epi16(0x7F));
        const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(_mm512_set1_epi16(0x7F), codes), 8);
        __m512i value = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(120 << 7));
        const __mmask32 subnormal = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8));
        value = _mm512_mask_permutexvar_epi16(value, subnormal, size, _mm512_load_si512(small));
        const __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7F));
        value = _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7FC0));
        return _mm512_or_si512(value, sign);
    }
    static __m512i load32(const void* cache, std::int64_t at) {
        auto* from = reinterpret_cast<const __m256i*>(static_cast<const std::uint8_t*>(cache) + at);
        return decode(_mm512_cvtepu8_epi16(_mm256_loadu_si256(from)));
    }
    static __m512i load16(const void* cache, std::int64_t at) {
        auto* from = reinterpret_cast<const __m128i*>(static_cast<const std::uint8_t*>(cache) + at);
        return decode(_mm512_cvtepu8_epi16(_mm256_zextsi128_si256(_mm_loadu_si128(from))));
    }
    static void fetch(const void* cache, std::int64_t at) {
        _mm_prefetch(static_cast<const std::uint8_t*>(cache) + at, _MM_HINT_T0);
    }
    static constexpr std::int64_t kLine = 64;
};

// Up to 16 keys from `offsets` on, features [d, d + 32), as lanes of pairs; keys from `count` on are zero.
template <class Stored>
inline void pack_keys(const void* cache, const std::int64_t* offsets, std::int64_t count, std::int64_t head_dim,
                      float* keys) {
    for (std::int64_t d = 0; d < head_dim; d += 32) {
        const bool whole = d + 32 <= head_dim;
        __m512i rows[16];
        for (int i = 0; i < 16; ++i) {
            if (i >= count) rows[i] = _mm512_setzero_si512();
            else rows[i] = whole ? Stored::load32(cache, offsets[i] + d) : Stored::load16(cache, offsets[i] + d);
        }
        transpose(rows);
        for (int i = 0; i < (whole ? 16 : 8); ++i) _mm512_store_si512(keys + (d / 2 + i) * kColumn, rows[i]);
    }
}

// A pair of values, feature by feature; `second` may be missing.
template <class Stored>
inline void pack_values(const void* cache, std::int64_t first, std::int64_t second, std::int64_t head_dim,
                        float* values) {
    alignas(64) static const std::uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i lower = _mm512_load_si512(low), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
    for (std::int64_t d = 0; d < head_dim; d += 32) {
        const bool whole = d + 32 <= head_dim;
        const __m512i a = whole ? Stored::load32(cache, first + d) : Stored::load16(cache, first + d);
        __m512i b = _mm512_setzero_si512();
        if (second >= 0) b = whole ? Stored::load32(cache, second + d) : Stored::load16(cache, second + d);
        _mm512_store_si512(values + d, _mm512_permutex2var_epi16(a, lower, b));
        if (whole) _mm512_store_si512(values + d + 16, _mm512_permutex2var_epi16(a, upper, b));
    }
}

template <class Stored>
void pack(const KeyTile& tile, float* packed) {
    const AttentionProblem& p = *tile.problem;
    const std::int64_t count = tile.end - tile.begin, to_values = p.kv_heads * p.head_dim;
    const std::int64_t padded = (count + 31) / 32 * 32;
    std::int64_t offsets[kTileKeys];
    key_offsets(tile, offsets);
    for (std::int64_t k = 0; k < padded; k += kColumn)
        pack_keys<Stored>(p.cache, offsets + k, count - k, p.head_dim, packed + k * (p.head_dim / 2));
    float* values = packed + kTileKeys * (p.head_dim / 2);
    for (std::int64_t k = 0; k < padded; k += 2, values += p.head_dim) {
        if (k < count)
            pack_values<Stored>(p.cache, offsets[k] + to_values, k + 1 < count ? offsets[k + 1] + to_values : -1,
                                p.head_dim, values);
        else
            for (std::int64_t d = 0; d < p.head_dim; d += 16) _mm512_store_ps(values + d, _mm512_setzero_ps());
    }
}

void pack_tile(const KeyTile& tile, void* packed) {
    if (tile.problem->type == KVType::fp8) pack<StoredE4M3>(tile, static_cast<float*>(packed));
    else pack<Stored16>(tile, static_cast<float*>(packed));
}

std::int64_t tile_bytes(std::int64_t head_dim) { return 2 * kTileKeys * head_dim * 2; }

std::int64_t query_bytes(std::int64_t head_dim) { return head_dim * 2; }

void pack_query(const float* q, std::int64_t head_dim, void* packed) {
    auto* to = static_cast<std::uint16_t*>(packed);
    for (std::int64_t d = 0; d < head_dim; d += 16) {
        const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(q + d));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d), reinterpret_cast<__m256i>(half));
    }
}

}  // namespace

const AttentionKernel kAttentionAvx512Bf16 = {tile_bytes, query_bytes, pack_query, pack_tile, attend_rows<Bf16Pairs>,
                                              merge_states};

}  // namespace fourfold
