// Plain loops that compilers turn into vectors; where the loader can choose, for several instruction sets.
#include "row_math.h"

#include <cmath>
#include <cstring>

#include "clones.h"

namespace fourfold {
namespace {

inline float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// e^x to within 2 ulp for x in [-87, 88]: 2^n times a polynomial for 2^f, |f| <= 1/2.
FOURFOLD_INLINE float exponential_inside(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    const float f = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts
    float p = 1.0f / 720.0f;
    p = p * f + 1.0f / 120.0f;
    p = p * f + 1.0f / 24.0f;
    p = p * f + 1.0f / 6.0f;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return from_bits(to_bits(p) + (to_bits(shifted) << 23));
}

FOURFOLD_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    return exponential_inside(x);
}

FOURFOLD_INLINE float silu(float x) { return x / (1.0f + exponential(-x)); }

FOURFOLD_INLINE float gelu_tanh(float x) {  // x (1 + tanh z) / 2 = x / (1 + e^-2z)
    const float z = 0.79788456f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-2.0f * z));
}

}  // namespace

FOURFOLD_CLONES void norm_row(const float* x, const float* weight, float floor, std::int64_t n, float* out) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(sum + floor);
    for (std::int64_t i = 0; i < n; ++i) out[i] = x[i] * weight[i] * factor;
}

FOURFOLD_CLONES void gate_row(const Gate& kind, const float* gate, const float* up, std::int64_t n, float* out) {
    if (kind.activation == Activation::silu) {
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) out[i] = silu(gate[i]) * up[i];
    } else if (kind.activation == Activation::gelu_tanh) {
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) out[i] = gelu_tanh(gate[i]) * up[i];
    } else {
        const float alpha = kind.alpha, limit = kind.limit;
#pragma omp simd
        for (std::int64_t i = 0; i < n; ++i) {
            const float g = gate[i] > limit ? limit : gate[i];
            const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
            out[i] = g / (1.0f + exponential(-alpha * g)) * (u + 1.0f);
        }
    }
}

FOURFOLD_CLONES void cap_row(float cap, std::int64_t n, float* x) {
    const float twice = 2.0f / cap;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) x[i] = cap - 2.0f * cap / (1.0f + exponential(twice * x[i]));
}

FOURFOLD_CLONES void rotate_row(float* head, const float* angles, std::int64_t d) {
    const std::int64_t half = d / 2;
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[half + i], cos = angles[i], sin = angles[half + i];
        head[i] = a * cos - b * sin;
        head[half + i] = b * cos + a * sin;
    }
}

FOURFOLD_CLONES void add_row(const float* x, std::int64_t n, float* sum) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

FOURFOLD_CLONES void add_scaled_row(float factor, const float* x, std::int64_t n, float* sum) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) sum[i] += factor * x[i];
}

FOURFOLD_CLONES float dot_row(const float* a, const float* b, std::int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

FOURFOLD_CLONES void scale_row(float factor, std::int64_t n, float* x) {
    for (std::int64_t i = 0; i < n; ++i) x[i] *= factor;
}

FOURFOLD_CLONES Weighed weigh_row(const float* x, float largest, float factor, std::int64_t n, float* out) {
    float sum = 0.0f, most = 0.0f;
#pragma omp simd reduction(+ : sum) reduction(max : most)
    for (std::int64_t i = 0; i < n; ++i) {
        const float power = (x[i] - largest) * factor;
        const float weight = power < -87.0f ? 0.0f : exponential_inside(power);
        out[i] = weight;
        sum += weight;
        most = weight > most ? weight : most;
    }
    return {sum, most};
}

FOURFOLD_CLONES void widen_row(const std::uint16_t* bf16, std::int64_t n, float* out) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = from_bits(static_cast<std::uint32_t>(bf16[i]) << 16);
}

FOURFOLD_CLONES void narrow_row(const float* x, std::int64_t n, std::uint16_t* bf16) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
        const std::uint32_t bits = to_bits(x[i]), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
        bf16[i] = static_cast<std::uint16_t>((x[i] != x[i] ? bits | 0x400000u : rounded) >> 16);
    }
}

FOURFOLD_CLONES std::int64_t argmax_row(const float* x, std::int64_t n) {
    constexpr std::int64_t kTogether = 512;  // only where the largest is, are single values looked at
    float largest = -INFINITY;
    std::int64_t best = 0;
    for (std::int64_t begin = 0; begin < n; begin += kTogether) {
        const std::int64_t end = begin + kTogether < n ? begin + kTogether : n;
        float here = -INFINITY;
        std::int32_t unordered = 0;
#pragma omp simd reduction(max : here) reduction(+ : unordered)
        for (std::int64_t i = begin; i < end; ++i) {
            here = x[i] > here ? x[i] : here;
            unordered += x[i] != x[i] ? 1 : 0;
        }
        if (unordered) {
            for (std::int64_t i = begin;; ++i)
                if (x[i] != x[i]) return i;
        }
        if (here > largest) largest = here, best = begin;
    }
    for (std::int64_t i = best; i < n; ++i)
        if (x[i] == largest) return i;
    return 0;
}

}  // namespace fourfold
