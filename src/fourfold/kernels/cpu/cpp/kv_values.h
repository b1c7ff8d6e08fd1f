// Elements of a KV cache, one at a time: bf16, float32 and E4M3 (OCP OFP8: bias 7, no infinities, 0x7F is NaN).
// For files compiled for the plain instruction set only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"

namespace fourfold {
namespace {

inline float float_from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float from_e4m3(std::uint8_t code) {
    std::uint32_t exponent = (code >> 3) & 15u, mantissa = code & 7u, sign = (code & 0x80u) << 24;
    if ((code & 0x7Fu) == 0x7Fu) return float_from_bits(sign | 0x7FC00000u);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-9f;
    return float_from_bits(sign | (exponent + 120u) << 23 | mantissa << 20);
}

// Nearest even, saturating at +-448; a NaN stays a NaN.
inline std::uint8_t to_e4m3(float value) {
    std::uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 24) & 0x80u;
    if (magnitude > 0x7F800000u) return static_cast<std::uint8_t>(sign | 0x7Fu);
    float size = std::min(float_from_bits(magnitude), 448.0f);
    // adding 2^14 leaves multiples of 2^-9, rounded, in the lowest bits: the subnormal codes, and the first normal
    if (size < 0x1p-6f) return static_cast<std::uint8_t>(sign | (bits_of(size + 0x1p14f) & 0xFu));
    std::uint32_t normal = bits_of(size);
    normal += 0x7FFFFu + ((normal >> 20) & 1u);
    return static_cast<std::uint8_t>(sign | ((normal >> 20) - (120u << 3)));
}

inline std::uint16_t to_bf16_bits(float value) {
    std::uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// What is stored at `index`, before any scale.
inline float kv_value(const void* cache, KVType type, std::int64_t index) {
    if (type == KVType::f32) return static_cast<const float*>(cache)[index];
    if (type == KVType::fp8) return from_e4m3(static_cast<const std::uint8_t*>(cache)[index]);
    return float_from_bits(static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(cache)[index]) << 16);
}

}  // namespace
}  // namespace fourfold
