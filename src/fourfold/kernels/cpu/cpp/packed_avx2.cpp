// AVX2: the portable code compiled for it, but integer dot products for the arithmetic that wants them, and for the
// other a lookup of codes and more rows of x for each block that was decoded.
//
// vpmaddubsw multiplies unsigned by signed bytes, so the weight gives its magnitude to one side and its sign to x. A
// sum of two products is at most 2 * 128 * 127 and fits the 16 bits that it gets.
#define FOURFOLD_PACKED_NAME(name) name##_avx2_floats
#include "packed_portable.cpp"

#include <immintrin.h>

namespace fourfold {
namespace {

using Codes = __m256i[8][2];  // signed, by groups of four values and halves of the rows

void decode(WeightKind kind, const std::uint8_t* block, Codes& codes) {
    const auto* bytes = reinterpret_cast<const __m256i*>(block);
    const __m256i low = _mm256_set1_epi8(15), table = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    for (int i = 0; i < (kind == WeightKind::mxfp4 ? 8 : 16); ++i) {
        const __m256i held = _mm256_load_si256(bytes + i);
        if (kind == WeightKind::int8) {
            codes[i / 2][i % 2] = _mm256_xor_si256(held, _mm256_set1_epi8(-128));
        } else {
            codes[i / 2][i % 2] = _mm256_shuffle_epi8(table, _mm256_and_si256(held, low));
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(held, 4), low);
            codes[i / 2 + 4][i % 2] = _mm256_shuffle_epi8(table, high);
        }
    }
}

inline void add_block(const Codes& codes, const Floats (&scales)[2], const Int8Block& x, Floats (&sums)[2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i dots[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int g = 0; g < 8; ++g) {
        std::int32_t four;
        std::memcpy(&four, x.codes + 4 * g, 4);
        const __m256i values = _mm256_set1_epi32(four);
        for (int h = 0; h < 2; ++h) {
            const __m256i signed_values = _mm256_sign_epi8(values, codes[g][h]);
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes[g][h]), signed_values);
            dots[h] = _mm256_add_epi32(dots[h], _mm256_madd_epi16(pairs, ones));
        }
    }
    for (int h = 0; h < 2; ++h) {
        const __m256 factor = _mm256_mul_ps(scales[h], _mm256_set1_ps(x.half_scale));
        sums[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[h]), factor, sums[h]);
    }
}

void int8_rows(const PackedLinear& p, std::int64_t t, std::int64_t first, std::int64_t count) {
    const WeightKind kind = p.weight.kind;
    const std::int64_t k = p.weight.k, stride = prepared_row_bytes(Arithmetic::int8, k);
    const std::uint8_t* tile = p.weight.data + t * tile_bytes(kind, k);
    const char* rows = static_cast<const char*>(p.prepared) + first * stride;
    Floats sums[kRowsOfX][2] = {}, scales[2] = {};
    Codes codes;
    for (std::int64_t b = 0; b < blocks_of(k); ++b) {
        for (int i = 0; i < 512; i += 64) _mm_prefetch(tile + codes_at(kind, b) + 4096 + i, _MM_HINT_T0);
        decode(kind, tile + codes_at(kind, b), codes);
        decode_scales(kind, tile + scales_at(kind, k, b), Int8::unit(kind), scales);
        for (std::int64_t i = 0; i < count; ++i)
            add_block(codes, scales, reinterpret_cast<const Int8Block*>(rows + i * stride)[b], sums[i]);
    }
    store(p, t, first, count, sums);
}

constexpr std::int64_t kRowsOfBlock = 16;  // of x, that are multiplied with a block once it is decoded
constexpr int kRowsAtOnce = 4;

// As the portable decode; of a lane's nibble the lookup takes the last three bits.
void decode_values(WeightKind kind, const std::uint8_t* block, Block& values) {
    if (kind != WeightKind::mxfp4) {
        for (int q = 0; q < kParts; ++q) decode(kind, block, q, values);
        return;
    }
    const __m256 table = _mm256_setr_ps(0, 1, 2, 3, 4, 6, 8, 12);
    const __m256i sign = _mm256_set1_epi32(INT32_MIN);
    const auto value = [&](__m256i nibble) {
        const __m256i negative = _mm256_and_si256(_mm256_slli_epi32(nibble, 28), sign);
        return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, nibble), _mm256_castsi256_ps(negative));
    };
    for (int i = 0; i < 16; ++i)
        for (int q = 0; q < kParts; ++q) {
            const auto* four = reinterpret_cast<const __m256i*>(block + i / 4 * 64) + q;
            const __m256i bytes = _mm256_srli_epi32(_mm256_load_si256(four), i % 4 * 8);
            values[i][q] = value(bytes);
            values[i + 16][q] = value(_mm256_srli_epi32(bytes, 4));
        }
}

inline void read_values(const Bf16Block& block, float* x) {
    for (int i = 0; i < 32; i += 8) {
        const __m128i held = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block.values + i));
        const __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(held), 16));
        _mm256_storeu_ps(x + i, _mm256_permute_ps(wide, _MM_SHUFFLE(3, 1, 2, 0)));
    }
}

template <int rows>
void add_products(const Block& codes, const Floats (&scales)[2], const float (*x)[32], Floats (*sums)[2]) {
    Floats halves[2][rows][2] = {};
    for (int h = 0; h < 2; ++h)
        for (int i = 16 * h; i < 16 * h + 16; ++i)
            for (int r = 0; r < rows; ++r)
                for (int q = 0; q < 2; ++q)
                    halves[h][r][q] = _mm256_fmadd_ps(codes[i][q], _mm256_set1_ps(x[r][i]), halves[h][r][q]);
    for (int r = 0; r < rows; ++r)
        for (int q = 0; q < 2; ++q)
            sums[r][q] = _mm256_fmadd_ps(halves[0][r][q] + halves[1][r][q], scales[q], sums[r][q]);
}

void exact_rows(const PackedLinear& p, std::int64_t t, std::int64_t first, std::int64_t count) {
    constexpr decltype(&add_products<1>) add[] = {add_products<1>, add_products<2>, add_products<3>, add_products<4>};
    const WeightKind kind = p.weight.kind;
    const std::int64_t k = p.weight.k, stride = prepared_row_bytes(Arithmetic::exact, k);
    const std::uint8_t* tile = p.weight.data + t * tile_bytes(kind, k);
    const char* rows = static_cast<const char*>(p.prepared) + first * stride;
    Floats sums[kRowsOfBlock][2] = {}, scales[2] = {};
    Block codes;
    float x[kRowsAtOnce][32];
    for (std::int64_t b = 0; b < blocks_of(k); ++b) {
        decode_values(kind, tile + codes_at(kind, b), codes);
        decode_scales(kind, tile + scales_at(kind, k, b), Exact::unit(kind), scales);
        for (std::int64_t i = 0; i < count; i += kRowsAtOnce) {
            const std::int64_t some = std::min<std::int64_t>(kRowsAtOnce, count - i);
            for (std::int64_t r = 0; r < some; ++r)
                read_values(reinterpret_cast<const Bf16Block*>(rows + (i + r) * stride)[b], x[r]);
            add[some - 1](codes, scales, x, sums + i);
        }
    }
    store(p, t, first, count, sums);
}

}  // namespace

void packed_exact_avx2(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    for (std::int64_t t = tile_begin; t < tile_end; ++t)
        for (std::int64_t i = 0; i < call.m; i += kRowsOfBlock)
            exact_rows(call, t, i, std::min(kRowsOfBlock, call.m - i));
}

void packed_int8_avx2(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    for (std::int64_t t = tile_begin; t < tile_end; ++t)
        for (std::int64_t i = 0; i < call.m; i += kRowsOfX)
            int8_rows(call, t, i, std::min<std::int64_t>(kRowsOfX, call.m - i));
}

}  // namespace fourfold
