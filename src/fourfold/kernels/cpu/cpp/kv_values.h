// Elements of a KV cache, one at a time: bf16, float32 and E4M3 (OCP OFP8: bias 7, no infinities, 0x7F is NaN).
// For files compiled for the plain instruction set only.
#pragma once

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

// What is stored at `index`, before any scale.
inline float kv_value(const void* cache, KVType type, std::int64_t index) {
    if (type == KVType::f32) return static_cast<const float*>(cache)[index];
    if (type == KVType::fp8) return from_e4m3(static_cast<const std::uint8_t*>(cache)[index]);
    return float_from_bits(static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(cache)[index]) << 16);
}

}  // namespace
}  // namespace fourfold
