// Rounding keys and values into the cache, head by head.
#include <algorithm>
#include <cstring>

#include "kv_write.h"

namespace fourfold {
namespace {

float float_from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Nearest even, saturating at +-448; a NaN stays a NaN.
std::uint8_t to_e4m3(float value) {
    std::uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 24) & 0x80u;
    if (magnitude > 0x7F800000u) return static_cast<std::uint8_t>(sign | 0x7Fu);
    float size = std::min(float_from_bits(magnitude), 448.0f);
    // adding 2^14 leaves multiples of 2^-9, rounded, in the lowest bits: the subnormal codes, and the first normal
    if (size < 0x1p-6f) return static_cast<std::uint8_t>(sign | (bits_of(size + 0x1p14f) & 0xFu));
    std::uint32_t normal = bits_of(size);
    normal += 0x7FFFFu + ((normal >> 20) & 1u);
    return static_cast<std::uint8_t>(sign | ((normal >> 20) - (120u << 3)));
}

std::uint16_t to_bf16_bits(float value) {
    std::uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

void write_floats(const float* from, std::int64_t count, float, void* to) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * 4);
}

void write_bf16(const float* from, std::int64_t count, float, void* to) {
    for (std::int64_t i = 0; i < count; ++i) static_cast<std::uint16_t*>(to)[i] = to_bf16_bits(from[i]);
}

void write_e4m3(const float* from, std::int64_t count, float scale, void* to) {
    for (std::int64_t i = 0; i < count; ++i) static_cast<std::uint8_t*>(to)[i] = to_e4m3(from[i] / scale);
}

WriteHead writer(KVType type, AttentionIsa isa) {
    if (type == KVType::f32) return write_floats;
#if defined(FOURFOLD_AVX512)
    const bool allowed = isa == AttentionIsa::automatic || isa >= AttentionIsa::avx512;
    if (allowed && attention_has(AttentionIsa::avx512))
        return type == KVType::bf16 ? write_bf16_avx512 : write_e4m3_avx512;
#endif
    (void)isa;
    return type == KVType::bf16 ? write_bf16 : write_e4m3;
}

}  // namespace

void write_kv(const KVWrite& w, std::int64_t row_begin, std::int64_t row_end, AttentionIsa isa) {
    const WriteHead write = writer(w.type, isa);
    const std::int64_t heads = 2 * w.kv_heads, bytes = w.type == KVType::f32 ? 4 : w.type == KVType::bf16 ? 2 : 1;
    for (std::int64_t row = row_begin; row < row_end; ++row)
        for (std::int64_t head = 0; head < heads; ++head)
            write(w.kv + row * w.stride + head * w.head_dim, w.head_dim, w.kv_scales ? w.kv_scales[head] : 1.0f,
                  static_cast<char*>(w.cache) + (w.slots[row] * heads + head) * w.head_dim * bytes);
}

}  // namespace fourfold
