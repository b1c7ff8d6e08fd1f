// The bytes of packed weights and of prepared x, and the table of kernels. Plain data and declarations only.
//
// A tile is 16 rows of W. After the codes of every four of its blocks of 32 values (or of the last one to three) come
// 64 bytes with the blocks' scales, 16 bytes each, so that a tile is one stream in memory; bf16 has no scales.
//   mxfp4  256 bytes a block: byte 64 j + 4 r + c holds row r's value 4 j + c (low nibble) and 16 + 4 j + c (high)
//   int8   512 bytes a block: byte 64 j + 4 r + c holds row r's value 4 j + c, plus 128
//   bf16   1024 bytes a block: pair 16 p + r is row r's values 4 q + h and 4 q + h + 2 with q = p / 2, h = p % 2
// so that 64 bytes are 16 lanes of four bytes to be multiplied with four values of x (or two, as bf16) that all lanes
// share. Pairs lie two apart because a shift by a multiple of four then brings the nibbles of mxfp4 in place for both.
#pragma once

#include <cstdint>

#include "packed.h"

namespace fourfold {

inline constexpr std::int64_t kPackedBlock = 32;

// A block of a row of x for `int8`. Where the multipliers are busy with dot products, the scale's two parts are applied
// by a shift and by an addition to the exponent. A row is padded to an odd number of cache lines, so that rows under
// each other do not share the sets of a cache.
struct Int8Block {
    std::int8_t codes[32];
    float half_scale;    // of the scale, since E2M1 codes are held doubled; NaN where x has a NaN or an Inf
    float exponent;      // half_scale is 2^exponent * (1 + 2^shift)
    std::int32_t shift;
    std::int32_t start;  // -128 * sum of codes: weights are held with 128 added
};
static_assert(sizeof(Int8Block) == 48, "kernels step by this");

// A block of a row of x for `exact`: bf16, each four as 0, 2, 1, 3.
struct Bf16Block {
    std::uint16_t values[32];
};

namespace {  // each file its own, since they are compiled for different processors

constexpr inline std::int64_t blocks_of(std::int64_t k) { return (k + kPackedBlock - 1) / kPackedBlock; }

constexpr inline std::int64_t code_bytes(WeightKind kind) {
    return kind == WeightKind::mxfp4 ? 256 : kind == WeightKind::int8 ? 512 : 1024;
}

constexpr inline std::int64_t tile_bytes(WeightKind kind, std::int64_t k) {
    const std::int64_t scales = kind == WeightKind::bf16 ? 0 : 64;
    return blocks_of(k) * code_bytes(kind) + (blocks_of(k) + 3) / 4 * scales;
}

// Where the codes and the scales of block b begin in a tile.
constexpr inline std::int64_t codes_at(WeightKind kind, std::int64_t b) {
    return b * code_bytes(kind) + (kind == WeightKind::bf16 ? 0 : b / 4 * 64);
}

constexpr inline std::int64_t scales_at(WeightKind kind, std::int64_t k, std::int64_t b) {
    const std::int64_t end = b / 4 * 4 + 4 < blocks_of(k) ? b / 4 * 4 + 4 : blocks_of(k);
    return codes_at(kind, b / 4 * 4) + (end - b / 4 * 4) * code_bytes(kind) + b % 4 * kTileRows;
}

constexpr inline std::int64_t prepared_row_bytes(Arithmetic arithmetic, std::int64_t k) {
    std::int64_t block = arithmetic == Arithmetic::int8 ? sizeof(Int8Block) : sizeof(Bf16Block);
    return ((blocks_of(k) * block + 63) / 64 | 1) * 64;
}

// Fills in the scale of a block whose largest magnitude is `amax`, and returns what makes codes of its values:
// 1 / scale, or 0 where it has none.
inline float set_scale(float amax, Int8Block& block) {
    block.exponent = block.half_scale = amax < __builtin_inff() ? 0.0f : __builtin_nanf("");
    block.shift = 0;
    if (!(amax >= 0x1p-60f && amax < __builtin_inff())) return 0.0f;
    const float least = amax / 127.0f;
    std::uint32_t bits;
    __builtin_memcpy(&bits, &least, 4);
    bits -= 1;  // a power of two is the last of those that reach up to it
    const std::uint32_t eighths = bits >> 20 & 7;
    block.shift = eighths >= 4 ? 0 : eighths >= 2 ? 1 : eighths >= 1 ? 2 : 3;
    const std::int32_t exponent = static_cast<std::int32_t>(bits >> 23) - 128 - block.shift;
    const std::int32_t field = (exponent + 127) << 23;
    float power;
    __builtin_memcpy(&power, &field, 4);
    block.exponent = static_cast<float>(exponent);
    block.half_scale = static_cast<float>(1 + (1 << block.shift)) * power;
    return 0.5f / block.half_scale;
}

}  // namespace

struct PackedLinear {
    PackedWeight weight;
    const void* prepared;
    std::int64_t m;
    float* out;
    std::int64_t out_stride;
};

using PackedTiles = void (*)(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end);
using PrepareRow = void (*)(const float* x, std::int64_t k, void* row);

// 2^(byte - 127); byte 0 is the float32 subnormal 2^-127 and byte 255 is NaN.
extern const float* const kPackedScales;

void packed_int8_portable(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end);
void packed_exact_portable(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end);
void prepare_int8_portable(const float* x, std::int64_t k, void* row);
void prepare_exact_portable(const float* x, std::int64_t k, void* row);
#if defined(FOURFOLD_AVX2)
void packed_int8_avx2(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end);
void packed_int8_avx2_floats(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end);
void packed_exact_avx2_floats(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end);
void packed_exact_avx2(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end);
void prepare_int8_avx2_floats(const float* x, std::int64_t k, void* row);
void prepare_exact_avx2_floats(const float* x, std::int64_t k, void* row);
#endif
#if defined(FOURFOLD_AVX512VNNI)
void packed_int8_avx512(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end);
void prepare_int8_avx512(const float* x, std::int64_t k, void* row);
#endif
#if defined(FOURFOLD_AVX512BF16)
void packed_exact_avx512(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end);
void prepare_exact_avx512(const float* x, std::int64_t k, void* row);
#endif

}  // namespace fourfold
