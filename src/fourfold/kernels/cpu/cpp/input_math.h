// What a checkpoint's scheme makes of the input of a linear layer, in blocks of 32 values: turned by a matrix, then
// rounded to an MX format. `formats` says what it must be; a row of n values, n % 32 == 0, depends on itself alone.
#pragma once

#include <cstdint>

namespace fourfold {

constexpr std::int64_t kSchemeBlock = 32;

// A value on the grid of an MX format, as formats/numbers/element.py has it.
struct MxElement {
    float max;
    std::int32_t max_exponent, min_exponent, mantissa_bits;
};

struct InputScheme {
    const float* rotation = nullptr;  // [32, 32]: x becomes x R
    float hadamard = 0.0f;            // where R is this times Hadamard's matrix, which takes fewer steps
    bool rounded = false;
    MxElement element{};
    bool codes = false;  // rounded, and the element fits: all values are int8 codes under powers of two
    bool any() const { return rotation || rounded; }
};

// Whether a [32, 32] matrix is a multiple of Sylvester's, its first value the factor.
bool is_hadamard(const float* rotation);
// out may be x.
void apply_scheme(const InputScheme& scheme, const float* x, std::int64_t n, float* out);
// A row of Int8Blocks that are x to the bit (below 2^-60 zeros), where `prepare` would move values between its codes; x
// is rounded to an element that fits.
void prepare_codes(const MxElement& element, const float* x, std::int64_t n, void* row);

}  // namespace fourfold
