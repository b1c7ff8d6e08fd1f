// For any processor, in the vectors that GCC and Clang have on all of them: a block of a tile is decoded once and
// multiplied with a few rows of x, 16 rows of W in step. Integers are summed as float32, which is exact up to 2^24; a
// block stays below. Another file includes this one to compile it for AVX2.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "packed_layout.h"

#if !defined(FOURFOLD_PACKED_NAME)
#define FOURFOLD_PACKED_NAME(name) name##_portable
#endif

namespace fourfold {
namespace {

constexpr int kRowsOfX = 4;

#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4, kParts = 16 / kLanes;  // of the 16 rows

using Floats = float __attribute__((vector_size(kVectorBytes)));
using Ints = std::int32_t __attribute__((vector_size(kVectorBytes)));
using Block = Floats[32][kParts];

template <typename To, typename From>
To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

std::uint16_t to_bf16(float value) {
    const auto bits = bits_as<std::uint32_t>(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

Ints load(const std::uint8_t* bytes) {
    Ints lanes;
    std::memcpy(&lanes, bytes, kVectorBytes);
    return lanes;
}

// 2 * E2M1 is 0 1 2 3 4 6 8 12: computed, since tables cannot be looked up in step everywhere.
Floats doubled_e2m1(Ints nibbles) {
    const Ints m = nibbles & 7, value = m + ((m - 4) & (m > 4)) + (2 & (m > 6)), negative = -((nibbles >> 3) & 1);
    return __builtin_convertvector((value ^ negative) - negative, Floats);
}

// Codes of part q of a block's rows, value by value: doubled E2M1, MXINT8's integers, or bfloat16s.
void decode(WeightKind kind, const std::uint8_t* block, int q, Block& values) {
    block += q * kVectorBytes;
    if (kind == WeightKind::mxfp4) {
        for (int i = 0; i < 16; ++i) {
            const Ints bytes = load(block + i / 4 * 64) >> i % 4 * 8;
            values[i][q] = doubled_e2m1(bytes);
            values[i + 16][q] = doubled_e2m1(bytes >> 4);
        }
    } else if (kind == WeightKind::int8) {
        for (int i = 0; i < 32; ++i) {
            const Ints bytes = (load(block + i / 4 * 64) >> i % 4 * 8) & 255;
            values[i][q] = __builtin_convertvector(bytes - 128, Floats);
        }
    } else {
        for (int i = 0; i < 32; ++i) {
            const Ints pair = load(block + (i / 4 * 2 + i % 2) * 64);
            values[i][q] = bits_as<Floats>(i % 4 < 2 ? pair << 16 : pair & -65536);
        }
    }
}

// Scales of a block times `unit`, what one step of the integer codes is worth.
void decode_scales(WeightKind kind, const std::uint8_t* bytes, float unit, Floats (&values)[kParts]) {
    for (int r = 0; r < kTileRows; ++r)
        values[r / kLanes][r % kLanes] = kind == WeightKind::bf16 ? 1.0f : kPackedScales[bytes[r]] * unit;
}

void add_block(const Block& codes, const Floats (&scales)[kParts], const float (&x)[32], float x_scale,
               Floats (&sums)[kParts]) {
    Floats first[kParts] = {}, second[kParts] = {};  // two chains, for their latency
    for (int i = 0; i < 16; ++i)
        for (int q = 0; q < kParts; ++q) {
            first[q] += codes[i][q] * x[i];
            second[q] += codes[i + 16][q] * x[i + 16];
        }
    for (int q = 0; q < kParts; ++q) sums[q] += (first[q] + second[q]) * (scales[q] * x_scale);
}

struct Int8 {
    static constexpr Arithmetic kArithmetic = Arithmetic::int8;

    static float unit(WeightKind kind) { return kind == WeightKind::mxfp4 ? 1.0f : 0x1p-5f; }

    static float read(const void* row, std::int64_t b, float (&x)[32]) {
        const Int8Block& block = static_cast<const Int8Block*>(row)[b];
        for (int i = 0; i < 32; ++i) x[i] = block.codes[i];
        return block.half_scale;
    }
};

struct Exact {
    static constexpr Arithmetic kArithmetic = Arithmetic::exact;

    static float unit(WeightKind kind) { return kind == WeightKind::mxfp4 ? 0.5f : 0x1p-6f; }

    static float read(const void* row, std::int64_t b, float (&x)[32]) {
        const std::uint16_t* values = static_cast<const Bf16Block*>(row)[b].values;
        for (int i = 0; i < 32; ++i)
            x[i] = bits_as<float>(static_cast<std::uint32_t>(values[i / 4 * 4 + i % 2 * 2 + i / 2 % 2]) << 16);
        return 1.0f;
    }
};

void store(const PackedLinear& p, std::int64_t t, std::int64_t first, std::int64_t count,
           const Floats (*sums)[kParts]) {
    const std::int64_t n = t * kTileRows, width = std::min(kTileRows, p.weight.n - n);
    for (std::int64_t i = 0; i < count; ++i) {
        float* out = p.out + (first + i) * p.out_stride + n;
        for (std::int64_t r = 0; r < width; ++r)
            out[r] = sums[i][r / kLanes][r % kLanes] + (p.weight.bias ? p.weight.bias[n + r] : 0.0f);
    }
}

template <typename How>
void rows_of_x(const PackedLinear& p, std::int64_t t, std::int64_t first, std::int64_t count) {
    const std::int64_t stride = prepared_row_bytes(How::kArithmetic, p.weight.k);
    const std::uint8_t* tile = p.weight.data + t * tile_bytes(p.weight.kind, p.weight.k);
    const char* rows = static_cast<const char*>(p.prepared) + first * stride;
    const WeightKind kind = p.weight.kind;
    Floats sums[kRowsOfX][kParts] = {}, scales[kParts] = {};
    Block codes;
    float x[32];
    for (std::int64_t b = 0; b < blocks_of(p.weight.k); ++b) {
        for (int q = 0; q < kParts; ++q) decode(kind, tile + codes_at(kind, b), q, codes);
        decode_scales(kind, tile + scales_at(kind, p.weight.k, b), How::unit(kind), scales);
        for (std::int64_t i = 0; i < count; ++i) {
            const float x_scale = How::read(rows + i * stride, b, x);
            add_block(codes, scales, x, x_scale, sums[i]);
        }
    }
    store(p, t, first, count, sums);
}

template <typename How>
void all_rows(const PackedLinear& p, std::int64_t tile_begin, std::int64_t tile_end) {
    for (std::int64_t t = tile_begin; t < tile_end; ++t)
        for (std::int64_t i = 0; i < p.m; i += kRowsOfX)
            rows_of_x<How>(p, t, i, std::min<std::int64_t>(kRowsOfX, p.m - i));
}

void prepare_block(const float* x, Int8Block& to) {
    std::uint32_t largest = 0;  // as bits: a NaN is larger than Inf, and Inf than all else
    for (int i = 0; i < 32; ++i) largest = std::max(largest, bits_as<std::uint32_t>(x[i]) & 0x7FFFFFFFu);
    const float inverse = set_scale(bits_as<float>(largest), to);
    to.start = 0;
    for (int i = 0; i < 32; ++i) {
        to.codes[i] = static_cast<std::int8_t>(inverse == 0.0f ? 0.0f : std::nearbyint(x[i] * inverse));
        to.start -= 128 * to.codes[i];
    }
}

}  // namespace

void FOURFOLD_PACKED_NAME(packed_int8)(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    all_rows<Int8>(call, tile_begin, tile_end);
}

void FOURFOLD_PACKED_NAME(packed_exact)(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    all_rows<Exact>(call, tile_begin, tile_end);
}

void FOURFOLD_PACKED_NAME(prepare_int8)(const float* x, std::int64_t k, void* row) {
    for (std::int64_t b = 0; b < k / kPackedBlock; ++b)
        prepare_block(x + b * kPackedBlock, static_cast<Int8Block*>(row)[b]);
}

void FOURFOLD_PACKED_NAME(prepare_exact)(const float* x, std::int64_t k, void* row) {
    for (std::int64_t i = 0; i < blocks_of(k) * kPackedBlock; ++i)
        static_cast<std::uint16_t*>(row)[i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = i < k ? to_bf16(x[i]) : 0;
}

}  // namespace fourfold
