// AVX-512 with bf16 dot products: two blocks (64 codes) per step, twice the codes per instruction of float32.
//
// Codes become bf16 with one 16-bit permute of a 32-entry table that holds the codes twice: the index's fifth bit
// (the lowest of the neighbouring nibble) then does not matter. vdpbf16ps adds products of bf16 pairs in float32;
// a product of a bf16 and a code is exact, so only the order of the sums differs from float32 code. The price:
// the instruction takes subnormal inputs and results (below 1.2e-38, before the block's scale) as zero.
// x per pair of blocks: 32 even elements, then 32 odd; zeros fill up an odd number of blocks.
#include <immintrin.h>

#include "avx512_bf16.h"
#include "mxfp4.h"

namespace fourfold {
namespace {

constexpr int kRowsOfW = 2;
constexpr std::int64_t kPair = 2 * kBlock;

inline std::int64_t pairs(std::int64_t k) { return (k + kPair - 1) / kPair; }

inline __m512i code_table() {
    alignas(32) static const std::uint16_t codes[16] = {0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040,
                                                        0x4080, 0x40C0, 0x8000, 0xBF00, 0xBF80, 0xBFC0,
                                                        0xC000, 0xC040, 0xC080, 0xC0C0};
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(codes)));
}

std::int64_t prepared_bytes(std::int64_t m, std::int64_t k) { return m * pairs(k) * kPair * 2; }

void prepare(const void* x, Float, std::int64_t m, std::int64_t k, void* prepared) {
    alignas(64) std::uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<std::uint16_t>(2 * i);
    const __m512i even = _mm512_load_si512(order);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    auto* to = static_cast<std::uint16_t*>(prepared);
    for (std::int64_t j = 0; j < m; ++j) {
        const std::uint16_t* from = static_cast<const std::uint16_t*>(x) + j * k;
        for (std::int64_t i = 0; i < k; i += kPair, to += kPair) {
            __m512i low = _mm512_loadu_si512(from + i);
            __m512i high = i + kBlock < k ? _mm512_loadu_si512(from + i + kBlock) : _mm512_setzero_si512();
            _mm512_store_si512(to, _mm512_permutex2var_epi16(low, even, high));
            _mm512_store_si512(to + kBlock, _mm512_permutex2var_epi16(low, odd, high));
        }
    }
}

struct Codes {
    __m512bh even, odd;
    __m512 scale;
};

inline Codes decode(__m256i bytes, float first, float second, __m512i table) {
    __m512i wide = _mm512_cvtepu8_epi16(bytes);
    __m512i even = _mm512_permutexvar_epi16(wide, table);
    __m512i odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, 4), table);
    __m512 scale = _mm512_mask_broadcastss_ps(_mm512_set1_ps(first), 0xFF00, _mm_set_ss(second));
    return {reinterpret_cast<__m512bh>(even), reinterpret_cast<__m512bh>(odd), scale};
}

inline Codes pair_of_blocks(const std::uint8_t* bytes, const std::uint8_t* scales, __m512i table) {
    return decode(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)), kScaleValues[scales[0]],
                  kScaleValues[scales[1]], table);
}

inline Codes last_block(const std::uint8_t* bytes, const std::uint8_t* scales, __m512i table) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return decode(_mm256_zextsi128_si256(half), kScaleValues[scales[0]], 0.0f, table);
}

template <int NR, int MR>
inline void add(const Codes (&codes)[NR], const std::uint16_t* x, std::int64_t stride, __m512 (&sums)[NR][MR]) {
    for (int j = 0; j < MR; ++j) {
        auto x_even = reinterpret_cast<__m512bh>(_mm512_load_si512(x + j * stride));
        auto x_odd = reinterpret_cast<__m512bh>(_mm512_load_si512(x + j * stride + kBlock));
        for (int i = 0; i < NR; ++i) {
            __m512 block = _mm512_dpbf16_ps(_mm512_setzero_ps(), x_even, codes[i].even);
            block = _mm512_dpbf16_ps(block, x_odd, codes[i].odd);
            sums[i][j] = _mm512_fmadd_ps(block, codes[i].scale, sums[i][j]);
        }
    }
}

template <int NR, int MR>
void tile(const LinearProblem& p, std::int64_t n, std::int64_t m) {
    const __m512i table = code_table();
    const std::int64_t row_bytes = p.k / 2, row_scales = p.k / kBlock, stride = pairs(p.k) * kPair;
    const std::uint8_t* blocks = p.blocks + n * row_bytes;
    const std::uint8_t* scales = p.scales + n * row_scales;
    const std::uint16_t* x = static_cast<const std::uint16_t*>(p.x) + m * stride;
    __m512 sums[NR][MR];
    for (int i = 0; i < NR; ++i)
        for (int j = 0; j < MR; ++j) sums[i][j] = _mm512_setzero_ps();
    Codes codes[NR];
    std::int64_t b = 0;
    for (; b + 2 <= row_scales; b += 2) {
        for (int i = 0; i < NR; ++i)
            codes[i] = pair_of_blocks(blocks + i * row_bytes + b * 16, scales + i * row_scales + b, table);
        add(codes, x + b * kBlock, stride, sums);
    }
    if (b < row_scales) {
        for (int i = 0; i < NR; ++i)
            codes[i] = last_block(blocks + i * row_bytes + b * 16, scales + i * row_scales + b, table);
        add(codes, x + b * kBlock, stride, sums);
    }
    for (int i = 0; i < NR; ++i)
        for (int j = 0; j < MR; ++j) store_bf16(p.out, (m + j) * p.n + n + i, _mm512_reduce_add_ps(sums[i][j]));
}

template <int NR>
void all_of_x(const LinearProblem& p, std::int64_t n) {
    std::int64_t m = 0;
    for (; m + 8 <= p.m; m += 8) tile<NR, 8>(p, n, m);
    for (; m + 4 <= p.m; m += 4) tile<NR, 4>(p, n, m);
    for (; m + 2 <= p.m; m += 2) tile<NR, 2>(p, n, m);
    for (; m < p.m; ++m) tile<NR, 1>(p, n, m);
}

void rows(const LinearProblem& p, std::int64_t begin, std::int64_t end) {
    std::int64_t n = begin;
    for (; n + kRowsOfW <= end; n += kRowsOfW) all_of_x<kRowsOfW>(p, n);
    for (; n < end; ++n) all_of_x<1>(p, n);
}

}  // namespace

const LinearKernel kLinearAvx512Bf16 = {prepared_bytes, prepare, rows};

}  // namespace fourfold
