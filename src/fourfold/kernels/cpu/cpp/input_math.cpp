// Plain loops that compilers turn into vectors, as in row_math.cpp.
#include "input_math.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "clones.h"
#include "packed_layout.h"

namespace fourfold {
namespace {

using Floats = float __attribute__((vector_size(64)));

template <typename To, typename From>
FOURFOLD_INLINE To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// One bit of the index: sums and differences of what is 16 apart move next to each other, and after five such steps
// every bit has been taken and all indices are where they were.
FOURFOLD_INLINE void butterflies(const float* x, float* out) {
    for (int i = 0; i < 16; ++i) {
        out[2 * i] = x[i] + x[i + 16];
        out[2 * i + 1] = x[i] - x[i + 16];
    }
}

FOURFOLD_INLINE void turn_by_hadamard(float factor, const float* x, float* out) {
    float a[32], b[32];
    butterflies(x, a);
    butterflies(a, b);
    butterflies(b, a);
    butterflies(a, b);
    butterflies(b, a);
    for (int i = 0; i < 32; ++i) out[i] = a[i] * factor;
}

FOURFOLD_INLINE void turn(const float* rotation, const float* x, float* out) {
    Floats sums[2] = {}, row[2];
    for (int i = 0; i < 32; ++i) {
        std::memcpy(row, rotation + i * 32, sizeof(row));
        sums[0] += row[0] * x[i];
        sums[1] += row[1] * x[i];
    }
    std::memcpy(out, sums, sizeof(sums));
}

// formats/numbers/scale.py, rule EVEN: the exponent of a block's scale. A float64 has no subnormals here.
FOURFOLD_INLINE std::int32_t shared_exponent(float amax, const MxElement& element) {
    const auto bits = bits_as<std::int64_t>(static_cast<double>(amax));
    const std::int64_t one = std::int64_t{1} << 52, fraction = bits & (one - 1);
    const auto exponent = static_cast<std::int32_t>(bits >> 52) - 1023 - element.max_exponent;
    return std::clamp(exponent + (fraction >= one - (one >> (element.mantissa_bits + 1)) ? 1 : 0), -127, 127);
}

FOURFOLD_INLINE float power_of_two(std::int32_t exponent) {  // from -127 on, which is subnormal
    return bits_as<float>(exponent == -127 ? 1 << 22 : (exponent + 127) << 23);
}

FOURFOLD_INLINE std::int32_t largest_bits(const float* x) {  // a NaN's are larger than Inf's
    std::int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < 32; ++i) {
        const std::int32_t bits = bits_as<std::int32_t>(x[i]) & 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

FOURFOLD_INLINE void round_block(const MxElement& element, const float* x, float* out) {
    const std::int32_t largest = largest_bits(x);
    if (largest >= 0x7F800000) {
        for (int i = 0; i < 32; ++i) out[i] = NAN;
        return;
    }
    const std::int32_t exponent = shared_exponent(bits_as<float>(largest), element);
    const float scale = power_of_two(exponent), inverse = power_of_two(-exponent), max = element.max;
    const std::int32_t smallest = (127 + element.min_exponent) << 23, fraction = element.mantissa_bits << 23;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
#pragma omp simd
    for (int i = 0; i < 32; ++i) {
        float value = x[i] * inverse;
        value = value > max ? max : value < -max ? -max : value;
        const std::int32_t power = bits_as<std::int32_t>(value) & 0x7F800000;
        const std::int32_t step = (power > smallest ? power : smallest) - fraction;
        const float steps = value * bits_as<float>((254 << 23) - step) + magic - magic;
        out[i] = steps * bits_as<float>(step) * scale;
    }
}

}  // namespace

bool is_hadamard(const float* rotation) {
    for (unsigned i = 0; i < 32; ++i)
        for (unsigned j = 0; j < 32; ++j)
            if (rotation[i * 32 + j] != (__builtin_popcount(i & j) % 2 ? -rotation[0] : rotation[0])) return false;
    return rotation[0] != 0.0f;
}

FOURFOLD_CLONES void apply_scheme(const InputScheme& scheme, const float* x, std::int64_t n, float* out) {
    for (std::int64_t i = 0; i < n; i += kSchemeBlock) {
        const float* from = x + i;
        if (scheme.hadamard != 0.0f) turn_by_hadamard(scheme.hadamard, from, out + i), from = out + i;
        else if (scheme.rotation) turn(scheme.rotation, from, out + i), from = out + i;
        if (scheme.rounded) round_block(scheme.element, from, out + i);
    }
}

FOURFOLD_CLONES void prepare_codes(const MxElement& element, const float* x, std::int64_t n, void* row) {
    auto* block = static_cast<Int8Block*>(row);
    for (std::int64_t at = 0; at < n; at += kSchemeBlock, ++block) {
        const std::int32_t largest = largest_bits(x + at);
        const bool finite = largest < 0x7F800000, usable = finite && largest >= 0x21800000;  // 2^-60
        const std::int32_t shared = usable ? shared_exponent(bits_as<float>(largest), element) : 0;
        const std::int32_t unit = shared + element.min_exponent - element.mantissa_bits;
        const float inverse = usable ? power_of_two(-unit) : 0.0f;
        std::int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < 32; ++i) {
            const std::int32_t code = usable ? static_cast<std::int32_t>(x[at + i] * inverse) : 0;
            block->codes[i] = static_cast<std::int8_t>(code);
            sum += code;
        }
        block->shift = 0;
        block->start = -128 * sum;
        block->half_scale = usable ? power_of_two(unit - 1) : finite ? 0.0f : NAN;
        block->exponent = usable ? static_cast<float>(unit - 2) : finite ? 0.0f : NAN;
    }
}

}  // namespace fourfold
