// One head of one token into the cache: `count` values over `scale`, rounded. Included by files compiled for
// different instruction sets: declarations only.
#pragma once

#include <cstdint>

#include "attention.h"

namespace fourfold {

using WriteHead = void (*)(const float* from, std::int64_t count, float scale, void* to);

#if defined(FOURFOLD_AVX512)
void write_bf16_avx512(const float* from, std::int64_t count, float scale, void* to);
void write_e4m3_avx512(const float* from, std::int64_t count, float scale, void* to);
#endif

}  // namespace fourfold
