// Plain C++ for any processor. Sixteen running sums per output let a compiler use whatever vectors it has.
#include <algorithm>
#include <cstring>

#include "mxfp4.h"

namespace fourfold {
namespace {

constexpr int kLanes = 16;
constexpr int kRowsOfX = 4;
constexpr float kCodes[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                              -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

float from_bf16(std::uint16_t half) {
    std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
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

void store(void* out, Float type, std::int64_t index, float value) {
    if (type == Float::bf16) static_cast<std::uint16_t*>(out)[index] = to_bf16(value);
    else static_cast<float*>(out)[index] = value;
}

void decode(const std::uint8_t* bytes, float* codes) {
    for (int i = 0; i < kBlock / 2; ++i) {
        codes[2 * i] = kCodes[bytes[i] & 15];
        codes[2 * i + 1] = kCodes[bytes[i] >> 4];
    }
}

std::int64_t prepared_bytes(std::int64_t m, std::int64_t k) { return m * k * 4; }

void prepare(const void* x, Float type, std::int64_t m, std::int64_t k, void* prepared) {
    if (type == Float::f32) {
        std::memcpy(prepared, x, static_cast<std::size_t>(m * k) * 4);
        return;
    }
    for (std::int64_t i = 0; i < m * k; ++i)
        static_cast<float*>(prepared)[i] = from_bf16(static_cast<const std::uint16_t*>(x)[i]);
}

void add_block(const float* x, const float* codes, float scale, float* sums) {
    for (int lane = 0; lane < kLanes; ++lane)
        sums[lane] += (x[lane] * codes[lane] + x[lane + kLanes] * codes[lane + kLanes]) * scale;
}

float total(const float* sums) {
    float halves[kLanes];
    std::copy(sums, sums + kLanes, halves);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) halves[lane] += halves[lane + width];
    return halves[0];
}

void row(const LinearProblem& p, std::int64_t n, std::int64_t m, std::int64_t count) {
    float sums[kRowsOfX][kLanes] = {};
    float codes[kBlock];
    for (std::int64_t b = 0; b < p.k / kBlock; ++b) {
        decode(p.blocks + n * (p.k / 2) + b * (kBlock / 2), codes);
        float scale = kScaleValues[p.scales[n * (p.k / kBlock) + b]];
        for (std::int64_t i = 0; i < count; ++i)
            add_block(static_cast<const float*>(p.x) + (m + i) * p.k + b * kBlock, codes, scale, sums[i]);
    }
    for (std::int64_t i = 0; i < count; ++i) store(p.out, p.type, (m + i) * p.n + n, total(sums[i]));
}

void rows(const LinearProblem& p, std::int64_t begin, std::int64_t end) {
    for (std::int64_t n = begin; n < end; ++n)
        for (std::int64_t m = 0; m < p.m; m += kRowsOfX) row(p, n, m, std::min<std::int64_t>(kRowsOfX, p.m - m));
}

}  // namespace

const LinearKernel kLinearPortable = {prepared_bytes, prepare, rows};

void expand_rows_portable(const ExpandProblem& p, std::int64_t begin, std::int64_t end) {
    float codes[kBlock];
    for (std::int64_t b = begin * (p.k / kBlock); b < end * (p.k / kBlock); ++b) {
        decode(p.blocks + b * (kBlock / 2), codes);
        for (int i = 0; i < kBlock; ++i) store(p.out, p.type, b * kBlock + i, codes[i] * kScaleValues[p.scales[b]]);
    }
}

}  // namespace fourfold
