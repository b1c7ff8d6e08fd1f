// Weights into tiles and back: byte for byte, the same on every processor.
#include <algorithm>
#include <cstring>

#include "packed_layout.h"

namespace fourfold {
namespace {

constexpr float kE2M1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

struct ScaleValues {
    float value[256];
    ScaleValues() {
        for (std::uint32_t byte = 0; byte < 256; ++byte) {
            std::uint32_t bits = byte == 0 ? 0x00400000u : byte == 255 ? 0x7FC00000u : byte << 23;
            std::memcpy(&value[byte], &bits, 4);
        }
    }
};
const ScaleValues g_scales;

// Row r's 16 bytes of a block: nibbles i of the first and of the last 16 values share a byte.
void pack_codes_mxfp4(const std::uint8_t* from, std::int64_t r, std::uint8_t* block) {
    for (int i = 0; i < 8; ++i) {
        std::uint8_t* to = block + 64 * (i / 2) + 4 * r + 2 * (i % 2);
        to[0] = static_cast<std::uint8_t>((from[i] & 15) | (from[i + 8] << 4));
        to[1] = static_cast<std::uint8_t>((from[i] >> 4) | (from[i + 8] & 0xF0));
    }
}

void pack_codes_int8(const std::uint8_t* from, std::int64_t r, std::uint8_t* block) {
    for (int i = 0; i < 32; ++i) block[64 * (i / 4) + 4 * r + i % 4] = static_cast<std::uint8_t>(from[i] ^ 0x80);
}

template <typename PackCodes>
void pack_scaled(WeightKind kind, const std::uint8_t* codes, std::int64_t row_bytes, const std::uint8_t* scales,
                 std::int64_t n, std::int64_t k, std::uint8_t* tile, std::int64_t t, PackCodes pack_codes) {
    const std::int64_t blocks = blocks_of(k), from_bytes = row_bytes / blocks;
    // rows that fill up the last tile are zeros: of int8 under its bias, of both under a scale that is a number
    std::memset(tile, kind == WeightKind::int8 ? 0x80 : 0, static_cast<std::size_t>(packed_tile_bytes(kind, k)));
    const std::int64_t rows = std::min(kTileRows, n - t * kTileRows);
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = t * kTileRows + r;
        for (std::int64_t b = 0; b < blocks; ++b) {
            pack_codes(codes + row * row_bytes + b * from_bytes, r, tile + codes_at(kind, b));
            tile[scales_at(kind, k, b) + r] = scales[row * blocks + b];
        }
    }
}

// Where value i of row r lies among the 512 pairs' 16-bit halves of a block.
std::int64_t bf16_place(std::int64_t r, std::int64_t i) {
    std::int64_t pair = i / 4 * 2 + i % 2;
    return (pair * kTileRows + r) * 2 + i / 2 % 2;
}

float from_bf16(std::uint16_t half) {
    std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float mxfp4_value(const std::uint8_t* block, std::int64_t r, std::int64_t i) {
    std::uint8_t byte = block[64 * (i % 16 / 4) + 4 * r + i % 4];
    int nibble = i < 16 ? byte & 15 : byte >> 4;
    return nibble & 8 ? -kE2M1[nibble & 7] : kE2M1[nibble];
}

float packed_value(WeightKind kind, const std::uint8_t* block, std::int64_t r, std::int64_t i) {
    if (kind == WeightKind::mxfp4) return mxfp4_value(block, r, i);
    if (kind == WeightKind::int8) return (static_cast<int>(block[64 * (i / 4) + 4 * r + i % 4]) - 128) * 0x1p-6f;
    std::uint16_t half;
    std::memcpy(&half, block + bf16_place(r, i) * 2, 2);
    return from_bf16(half);
}

}  // namespace

const float* const kPackedScales = g_scales.value;

std::int64_t packed_tiles(std::int64_t n) { return (n + kTileRows - 1) / kTileRows; }

std::int64_t packed_tile_bytes(WeightKind kind, std::int64_t k) { return tile_bytes(kind, k); }

std::int64_t packed_bytes(WeightKind kind, std::int64_t n, std::int64_t k) {
    return packed_tiles(n) * packed_tile_bytes(kind, k);
}

void pack_mxfp4(const std::uint8_t* blocks, const std::uint8_t* scales, std::int64_t n, std::int64_t k,
                std::uint8_t* data, std::int64_t tile_begin, std::int64_t tile_end) {
    const std::int64_t bytes = packed_tile_bytes(WeightKind::mxfp4, k);
    for (std::int64_t t = tile_begin; t < tile_end; ++t)
        pack_scaled(WeightKind::mxfp4, blocks, k / 2, scales, n, k, data + t * bytes, t, pack_codes_mxfp4);
}

void pack_int8(const std::uint8_t* codes, const std::uint8_t* scales, std::int64_t n, std::int64_t k,
               std::uint8_t* data, std::int64_t tile_begin, std::int64_t tile_end) {
    const std::int64_t bytes = packed_tile_bytes(WeightKind::int8, k);
    for (std::int64_t t = tile_begin; t < tile_end; ++t)
        pack_scaled(WeightKind::int8, codes, k, scales, n, k, data + t * bytes, t, pack_codes_int8);
}

void pack_bf16(const std::uint16_t* values, std::int64_t n, std::int64_t k, std::uint8_t* data,
               std::int64_t tile_begin, std::int64_t tile_end) {
    const std::int64_t bytes = packed_tile_bytes(WeightKind::bf16, k);
    std::memset(data + tile_begin * bytes, 0, static_cast<std::size_t>((tile_end - tile_begin) * bytes));
    for (std::int64_t row = tile_begin * kTileRows; row < std::min(n, tile_end * kTileRows); ++row) {
        std::uint8_t* tile = data + row / kTileRows * bytes;
        for (std::int64_t i = 0; i < k; ++i) {
            std::int64_t place = i / kPackedBlock * 512 + bf16_place(row % kTileRows, i % kPackedBlock);
            std::memcpy(tile + place * 2, values + row * k + i, 2);
        }
    }
}

void unpack_row(const PackedWeight& weight, std::int64_t row, float* out) {
    const std::int64_t r = row % kTileRows;
    const std::uint8_t* tile = weight.data + row / kTileRows * packed_tile_bytes(weight.kind, weight.k);
    for (std::int64_t b = 0; b < blocks_of(weight.k); ++b) {
        float scale = 1.0f;
        if (weight.kind != WeightKind::bf16) scale = kPackedScales[tile[scales_at(weight.kind, weight.k, b) + r]];
        const std::int64_t count = std::min(kPackedBlock, weight.k - b * kPackedBlock);
        for (std::int64_t i = 0; i < count; ++i)
            out[b * kPackedBlock + i] = packed_value(weight.kind, tile + codes_at(weight.kind, b), r, i) * scale;
    }
}

}  // namespace fourfold
