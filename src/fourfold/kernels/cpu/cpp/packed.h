// Linear layers of packed weights: y = x W^T + bias, in tiles of 16 rows of W. Thread-free: callers share out the
// tiles among threads (and rows of x, for `prepare`). A result depends neither on the split nor on m.
//
// Two arithmetics. With kBlock = 32, codes c[n, i] of W and their scale 2^(s[n, b] - 127):
//   int8   x becomes int8 codes q = round(x * (1 / scale)), ties to even, under a scale per block: the smallest of 9/8,
//          5/4, 3/2 and 2 times a power of two that is amax / 127 or more. (Its products with sums are exact, and a
//          shift and an addition make them. Rounding errors are 1.1 times those of amax / 127; powers of two alone
//          would make them 1.5 times as large.) A block is summed exactly in integers, then y += scale * 2^(s - 127) *
//          sum in float32, block after block. A block below 2^-60 counts as zero. A block with a NaN or an Inf makes
//          its row's y NaN.
//   exact  x is rounded to bfloat16, the products of a block are summed in float32, then scaled and added.
//          The processor's bfloat16 dot products take subnormal factors and sums (below 1.2e-38) as zero.
// `kernels/reference.py` has the same in torch: round_to_int8_blocks and linear.
//
// This header is included by files compiled for different instruction sets: declarations and plain data only.
#pragma once

#include <cstdint>

namespace fourfold {

enum class WeightKind : int { mxfp4, int8, bf16 };  // int8: MXINT8, codes of 1/64 and E8M0 scales
enum class Arithmetic : int { int8, exact };        // bf16 weights take only `exact`

constexpr std::int64_t kTileRows = 16;

// [n, k], n padded to whole tiles. `data` comes from a pack function, 64-byte aligned, the same bytes on every
// processor: it may lie in a mapped file. mxfp4 and int8 want k % 32 == 0; bf16 takes any k.
struct PackedWeight {
    WeightKind kind;
    std::int64_t n, k;
    const std::uint8_t* data;
    const float* bias;  // [n] or null
};

inline constexpr int kPackedLayout = 1;  // goes up whenever the bytes that pack functions write change

std::int64_t packed_tiles(std::int64_t n);
std::int64_t packed_tile_bytes(WeightKind kind, std::int64_t k);
std::int64_t packed_bytes(WeightKind kind, std::int64_t n, std::int64_t k);

// Tiles [tile_begin, tile_end) of `data`. blocks [n, k / 2], scales [n, k / 32], codes [n, k], values [n, k] bf16.
void pack_mxfp4(const std::uint8_t* blocks, const std::uint8_t* scales, std::int64_t n, std::int64_t k,
                std::uint8_t* data, std::int64_t tile_begin, std::int64_t tile_end);
void pack_int8(const std::uint8_t* codes, const std::uint8_t* scales, std::int64_t n, std::int64_t k,
               std::uint8_t* data, std::int64_t tile_begin, std::int64_t tile_end);
void pack_bf16(const std::uint16_t* values, std::int64_t n, std::int64_t k, std::uint8_t* data,
               std::int64_t tile_begin, std::int64_t tile_end);

// Row `row` of W as float32 [k]: what an embedding looks up.
void unpack_row(const PackedWeight& weight, std::int64_t row, float* out);

std::uint64_t packed_checksum(const std::uint8_t* bytes, std::int64_t count);  // the same on every little-endian one

// What a processor can do, slowest first; each includes those before it.
enum class PackedIsa : int { automatic, portable, avx2, avx512vnni, avx512bf16 };
bool packed_isa_usable(PackedIsa isa);

// x [m, k] float32, rows `stride` values apart, laid out for `linear`: `prepared` is 64-byte aligned, holds
// prepared_bytes and is the same for all ISAs and for all weights of this k. Fills rows [row_begin, row_end).
std::int64_t prepared_bytes(Arithmetic arithmetic, std::int64_t m, std::int64_t k);
std::int64_t prepared_offset(Arithmetic arithmetic, std::int64_t i);  // bytes before value i of a row, i % 32 == 0
void prepare(Arithmetic arithmetic, const float* x, std::int64_t stride, std::int64_t m, std::int64_t k,
             std::int64_t row_begin, std::int64_t row_end, void* prepared, PackedIsa isa = PackedIsa::automatic);

// out [m, n] float32, rows `out_stride` values apart: the columns of tiles [tile_begin, tile_end).
void linear(const PackedWeight& weight, Arithmetic arithmetic, const void* prepared, std::int64_t m, float* out,
            std::int64_t out_stride, std::int64_t tile_begin, std::int64_t tile_end,
            PackedIsa isa = PackedIsa::automatic);

}  // namespace fourfold
