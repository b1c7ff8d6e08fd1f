// Plain C++ for any processor: a block of a tile is decoded once and multiplied with a few rows of x, 16 rows of W
// in step, which a compiler turns into whatever vectors there are.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "packed_layout.h"

namespace fourfold {
namespace {

constexpr int kLanes = static_cast<int>(kTileRows);
constexpr int kRowsOfX = 4;
constexpr std::int8_t kDoubledE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

std::uint16_t to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Integer codes of a block, value by value: doubled E2M1, or MXINT8's.
template <typename Value>
void decode_codes(WeightKind kind, const std::uint8_t* block, Value (&values)[32][kLanes]) {
    for (int i = 0; i < 32; ++i)
        for (int r = 0; r < kLanes; ++r) {
            int byte = block[64 * (kind == WeightKind::mxfp4 ? i % 16 / 4 : i / 4) + 4 * r + i % 4];
            if (kind == WeightKind::int8) values[i][r] = static_cast<Value>(byte - 128);
            else values[i][r] = static_cast<Value>(kDoubledE2M1[i < 16 ? byte & 15 : byte >> 4]);
        }
}

void decode_bf16(const std::uint8_t* block, float (&values)[32][kLanes]) {
    for (int i = 0; i < 32; ++i)
        for (int r = 0; r < kLanes; ++r) {
            std::uint16_t half;
            std::memcpy(&half, block + 64 * (i / 4 * 2 + i % 2) + 4 * r + 2 * (i / 2 % 2), 2);
            values[i][r] = from_bits(static_cast<std::uint32_t>(half) << 16);
        }
}

// Scales of a block times `unit`, what one step of the integer codes is worth.
void decode_scales(WeightKind kind, const std::uint8_t* scales, float unit, float (&values)[kLanes]) {
    for (int r = 0; r < kLanes; ++r) values[r] = kind == WeightKind::bf16 ? 1.0f : kPackedScales[scales[r]] * unit;
}

struct Int8 {
    using Value = std::int16_t;
    static constexpr Arithmetic kArithmetic = Arithmetic::int8;

    static float unit(WeightKind kind) { return kind == WeightKind::mxfp4 ? 1.0f : 0x1p-5f; }

    static void decode(WeightKind kind, const std::uint8_t* block, Value (&values)[32][kLanes]) {
        decode_codes(kind, block, values);
    }

    static void add(const Value (&w)[32][kLanes], const float* scales, const void* row, std::int64_t b, float* sums) {
        const Int8Block& x = static_cast<const Int8Block*>(row)[b];
        std::int32_t dots[kLanes] = {};
        for (int i = 0; i < 32; ++i)
            for (int r = 0; r < kLanes; ++r) dots[r] += w[i][r] * x.codes[i];
        for (int r = 0; r < kLanes; ++r) sums[r] += static_cast<float>(dots[r]) * (scales[r] * x.half_scale);
    }
};

struct Exact {
    using Value = float;
    static constexpr Arithmetic kArithmetic = Arithmetic::exact;

    static float unit(WeightKind kind) { return kind == WeightKind::mxfp4 ? 0.5f : 0x1p-6f; }

    static void decode(WeightKind kind, const std::uint8_t* block, Value (&values)[32][kLanes]) {
        if (kind == WeightKind::bf16) decode_bf16(block, values);
        else decode_codes(kind, block, values);
    }

    static void add(const Value (&w)[32][kLanes], const float* scales, const void* row, std::int64_t b, float* sums) {
        const Bf16Block& x = static_cast<const Bf16Block*>(row)[b];
        float dots[kLanes] = {};
        for (int i = 0; i < 32; ++i) {
            float value = from_bits(static_cast<std::uint32_t>(x.values[i / 4 * 4 + i % 2 * 2 + i / 2 % 2]) << 16);
            for (int r = 0; r < kLanes; ++r) dots[r] += w[i][r] * value;
        }
        for (int r = 0; r < kLanes; ++r) sums[r] += dots[r] * scales[r];
    }
};

template <typename How>
void rows_of_x(const PackedLinear& p, std::int64_t t, std::int64_t first, std::int64_t count) {
    const std::int64_t blocks = blocks_of(p.weight.k), stride = prepared_row_bytes(How::kArithmetic, p.weight.k);
    const std::uint8_t* tile = p.weight.data + t * packed_tile_bytes(p.weight.kind, p.weight.k);
    const char* rows = static_cast<const char*>(p.prepared) + first * stride;
    float sums[kRowsOfX][kLanes] = {}, scales[kLanes];
    typename How::Value codes[32][kLanes];
    for (std::int64_t b = 0; b < blocks; ++b) {
        How::decode(p.weight.kind, tile + codes_at(p.weight.kind, b), codes);
        decode_scales(p.weight.kind, tile + scales_at(p.weight.kind, p.weight.k, b), How::unit(p.weight.kind), scales);
        for (std::int64_t i = 0; i < count; ++i) How::add(codes, scales, rows + i * stride, b, sums[i]);
    }
    const std::int64_t n = t * kTileRows, width = std::min(kTileRows, p.weight.n - n);
    for (std::int64_t i = 0; i < count; ++i)
        for (std::int64_t r = 0; r < width; ++r)
            p.out[(first + i) * p.out_stride + n + r] = sums[i][r] + (p.weight.bias ? p.weight.bias[n + r] : 0.0f);
}

template <typename How>
void all_rows(const PackedLinear& p, std::int64_t tile_begin, std::int64_t tile_end) {
    for (std::int64_t t = tile_begin; t < tile_end; ++t)
        for (std::int64_t i = 0; i < p.m; i += kRowsOfX)
            rows_of_x<How>(p, t, i, std::min<std::int64_t>(kRowsOfX, p.m - i));
}

void prepare_block(const float* x, Int8Block& to) {
    std::uint32_t largest = 0;  // as bits: a NaN is larger than Inf, and Inf than all else
    for (int i = 0; i < 32; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        largest = std::max(largest, bits & 0x7FFFFFFFu);
    }
    to = Int8Block{};
    to.start = kRoundBits;
    const float amax = from_bits(largest);
    if (largest >= 0x7F800000u) to.half_scale = from_bits(0x7FC00000u);
    if (!(amax >= 0x1p-100f) || largest >= 0x7F800000u) return;
    const float inverse = 127.0f / amax;
    to.half_scale = amax / 127.0f * 0.5f;
    for (int i = 0; i < 32; ++i) {
        to.codes[i] = static_cast<std::int8_t>(std::nearbyint(x[i] * inverse));
        to.start -= 128 * to.codes[i];
    }
}

}  // namespace

void packed_int8_portable(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    all_rows<Int8>(call, tile_begin, tile_end);
}

void packed_exact_portable(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    all_rows<Exact>(call, tile_begin, tile_end);
}

void prepare_int8_portable(const float* x, std::int64_t k, void* row) {
    for (std::int64_t b = 0; b < k / kPackedBlock; ++b)
        prepare_block(x + b * kPackedBlock, static_cast<Int8Block*>(row)[b]);
}

void prepare_exact_portable(const float* x, std::int64_t k, void* row) {
    for (std::int64_t i = 0; i < blocks_of(k) * kPackedBlock; ++i)
        static_cast<std::uint16_t*>(row)[i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = i < k ? to_bf16(x[i]) : 0;
}

}  // namespace fourfold
