// Sixteen rows at a time, one in each lane, so that all that depends on what came before is lane by lane: what the
// roundings of columns (column_rounding.cpp) and of inputs (row_rounding.cpp) share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "clones.h"

// vectors pass between functions that are all inlined, so that no calling convention is asked
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace fourfold {

constexpr std::int64_t kBlock = 32;
constexpr std::int64_t kRowsAtOnce = 16;
constexpr std::int64_t kMostColumns = 128;  // at once
constexpr std::int64_t kTogether = 8;       // columns summed at the same time
constexpr std::int32_t kExponent = 0x7F800000;

typedef float V __attribute__((vector_size(64)));
typedef std::int32_t I __attribute__((vector_size(64)));

struct ElementRules {
    int bits, mantissa_bits, min_exponent, max_exponent;
    float max;
    std::int64_t added_from;  // the 52 bits of amax's fraction from which on the scale's exponent is one more
};

FOURFOLD_INLINE V floats(I bits) {
    V value;
    std::memcpy(&value, &bits, sizeof(V));
    return value;
}

FOURFOLD_INLINE I ints(V value) {
    I bits;
    std::memcpy(&bits, &value, sizeof(V));
    return bits;
}

FOURFOLD_INLINE I larger(I a, I b) { return a > b ? a : b; }

FOURFOLD_INLINE I spread(std::int32_t value) { return I{} + value; }

FOURFOLD_INLINE V spread(float value) { return V{} + value; }

// Powers of two as float32, 2^-127 being subnormal.
FOURFOLD_INLINE V power_of_two(I exponent_and_127) {
    return floats(exponent_and_127 > 0 ? exponent_and_127 << 23 : spread(1 << 22));
}

// The first `count` lanes, the others zero.
FOURFOLD_INLINE V take(const float* from, std::int64_t count) {
    V value = {};
    if (count == kRowsAtOnce) std::memcpy(&value, from, sizeof(V));
    else std::memcpy(&value, from, static_cast<std::size_t>(count) * 4);
    return value;
}

FOURFOLD_INLINE void give(V value, float* to, std::int64_t count) {
    if (count == kRowsAtOnce) std::memcpy(to, &value, sizeof(V));
    else std::memcpy(to, &value, static_cast<std::size_t>(count) * 4);
}

struct Grid {
    I smallest;   // the bits of the smallest normal value
    V carry;      // puts an element's step at the end of a float's mantissa
    V magnitude;  // likewise for what is not negative
    V max;

    FOURFOLD_INLINE explicit Grid(const ElementRules& element)
        : smallest(spread((127 + element.min_exponent) << 23)),
          carry(spread(1.5f * static_cast<float>(1 << (23 - element.mantissa_bits)))),
          magnitude(spread(static_cast<float>(1 << (23 - element.mantissa_bits)))),
          max(spread(element.max)) {}

    FOURFOLD_INLINE V nearest(V x) const {
        x = x > max ? max : x;
        x = x < -max ? -max : x;
        V carried = floats(larger(ints(x) & kExponent, smallest)) * carry;
        return (x + carried) - carried;
    }

    // The code of a value on the grid.
    FOURFOLD_INLINE I code(V q, const ElementRules& element) const {
        I bits = ints(q) & 0x7FFFFFFF;
        I power = larger(bits & kExponent, smallest);
        V carried = floats(power) * magnitude;
        I steps = ints(floats(bits) + carried) - ints(carried);
        I sign = (ints(q) >> 31) & (1 << (element.bits - 1));
        return (((power - smallest) >> (23 - element.mantissa_bits)) + steps) | sign;
    }
};

// acc[t] = sum over i in [0, count) of matrix[t][i] * x[i], for t < kTogether, added to what is there.
FOURFOLD_INLINE void add_products(const float* matrix, std::int64_t stride, const V* x, std::int64_t count, V* acc) {
    for (std::int64_t i = 0; i < count; ++i)
        for (std::int64_t t = 0; t < kTogether; ++t) acc[t] += x[i] * matrix[t * stride + i];
}

// The E8M0 byte of a block's scale by the rule that `element` holds.
FOURFOLD_INLINE I scale_of(const V* block, const ElementRules& element) {
    V amax = {};
    for (std::int64_t j = 0; j < kBlock; ++j) {
        V magnitude = floats(ints(block[j]) & 0x7FFFFFFF);
        amax = magnitude > amax ? magnitude : amax;
    }
    I byte = {};
    for (std::int64_t lane = 0; lane < kRowsAtOnce; ++lane) {
        const double wide = amax[lane];
        std::int64_t bits;
        std::memcpy(&bits, &wide, 8);
        const std::int64_t fraction = bits & ((std::int64_t{1} << 52) - 1);
        const std::int64_t exponent = (bits >> 52) - 1023 - element.max_exponent + (fraction >= element.added_from);
        byte[lane] = static_cast<std::int32_t>(std::min<std::int64_t>(std::max<std::int64_t>(exponent, -127), 127)) + 127;
    }
    return byte;
}

}  // namespace fourfold
