// A linear layer of MXFP4 weights as a whole, for engines that call one after the other.
#pragma once

#include <cstdint>

#include "packed.h"

namespace fourfold {

// out [m, n] = x [m, k] times the weight transposed, in int8, by all threads; both are bfloat16, or float32.
void walk_linear(const PackedWeight& weight, const std::uint16_t* x, std::int64_t m, std::uint16_t* out);
void walk_linear(const PackedWeight& weight, const float* x, std::int64_t m, float* out);

}  // namespace fourfold
