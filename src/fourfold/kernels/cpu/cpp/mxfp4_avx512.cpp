// AVX-512, float32: sixteen codes become sixteen floats with one permute of a sixteen-entry table.
//
// The permute reads only the low four bits of each index, so a byte widened to 32 bits gives the even code as it
// is and the odd code after one shift. x is laid out to match: per block sixteen even elements, then sixteen odd.
#include <immintrin.h>

#include "avx512_bf16.h"
#include "mxfp4.h"

namespace fourfold {
namespace {

constexpr int kRowsOfW = 2;

inline __m512 code_table() {
    return _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f,
                          -4.0f, -6.0f);
}

inline __m512i widen(const std::uint8_t* bytes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

inline __m512 even_codes(__m512i bytes, __m512 table) { return _mm512_permutexvar_ps(bytes, table); }

inline __m512 odd_codes(__m512i bytes, __m512 table) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
}

inline __m512 load_x(const void* x, Float type, std::int64_t index) {
    if (type == Float::f32) return _mm512_loadu_ps(static_cast<const float*>(x) + index);
    const void* halves = static_cast<const std::uint16_t*>(x) + index;
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(halves)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void store(void* out, Float type, std::int64_t index, float value) {
    if (type == Float::bf16) store_bf16(out, index, value);
    else static_cast<float*>(out)[index] = value;
}

std::int64_t prepared_bytes(std::int64_t m, std::int64_t k) { return m * k * 4; }

void prepare(const void* x, Float type, std::int64_t m, std::int64_t k, void* prepared) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    float* to = static_cast<float*>(prepared);
    for (std::int64_t i = 0; i < m * k; i += kBlock) {
        __m512 low = load_x(x, type, i), high = load_x(x, type, i + 16);
        _mm512_store_ps(to + i, _mm512_permutex2var_ps(low, even, high));
        _mm512_store_ps(to + i + 16, _mm512_permutex2var_ps(low, odd, high));
    }
}

template <int NR, int MR>
void tile(const LinearProblem& p, std::int64_t n, std::int64_t m) {
    const __m512 table = code_table();
    const std::uint8_t* blocks = p.blocks + n * (p.k / 2);
    const std::uint8_t* scales = p.scales + n * (p.k / kBlock);
    const float* x = static_cast<const float*>(p.x) + m * p.k;
    __m512 sums[NR][MR];
    for (int i = 0; i < NR; ++i)
        for (int j = 0; j < MR; ++j) sums[i][j] = _mm512_setzero_ps();
    for (std::int64_t b = 0; b < p.k / kBlock; ++b) {
        __m512 even[NR], odd[NR], scale[NR];
        for (int i = 0; i < NR; ++i) {
            __m512i bytes = widen(blocks + i * (p.k / 2) + b * (kBlock / 2));
            even[i] = even_codes(bytes, table);
            odd[i] = odd_codes(bytes, table);
            scale[i] = _mm512_set1_ps(kScaleValues[scales[i * (p.k / kBlock) + b]]);
        }
        for (int j = 0; j < MR; ++j) {
            __m512 x_even = _mm512_load_ps(x + j * p.k + b * kBlock);
            __m512 x_odd = _mm512_load_ps(x + j * p.k + b * kBlock + 16);
            for (int i = 0; i < NR; ++i) {
                __m512 block = _mm512_fmadd_ps(x_odd, odd[i], _mm512_mul_ps(x_even, even[i]));
                sums[i][j] = _mm512_fmadd_ps(block, scale[i], sums[i][j]);
            }
        }
    }
    for (int i = 0; i < NR; ++i)
        for (int j = 0; j < MR; ++j) store(p.out, p.type, (m + j) * p.n + n + i, _mm512_reduce_add_ps(sums[i][j]));
}

template <int NR>
void all_of_x(const LinearProblem& p, std::int64_t n) {
    std::int64_t m = 0;
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

const LinearKernel kLinearAvx512 = {prepared_bytes, prepare, rows};

void expand_rows_avx512(const ExpandProblem& p, std::int64_t begin, std::int64_t end) {
    const __m512 table = code_table();
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (std::int64_t b = begin * (p.k / kBlock); b < end * (p.k / kBlock); ++b) {
        __m512i bytes = widen(p.blocks + b * (kBlock / 2));
        __m512 scale = _mm512_set1_ps(kScaleValues[p.scales[b]]);
        __m512 even = _mm512_mul_ps(even_codes(bytes, table), scale);
        __m512 odd = _mm512_mul_ps(odd_codes(bytes, table), scale);
        __m512 low = _mm512_permutex2var_ps(even, first, odd), high = _mm512_permutex2var_ps(even, second, odd);
        if (p.type == Float::f32) {
            float* out = static_cast<float*>(p.out) + b * kBlock;
            _mm512_storeu_ps(out, low);
            _mm512_storeu_ps(out + 16, high);
        } else {
            auto* out = reinterpret_cast<__m256i*>(static_cast<std::uint16_t*>(p.out) + b * kBlock);
            _mm256_storeu_si256(out, to_bf16(low));
            _mm256_storeu_si256(out + 1, to_bf16(high));
        }
    }
}

}  // namespace fourfold
