// MXFP4 on a CPU: y = x W^T and the expansion of W, for every instruction set that this build holds.
//
// W is [n, k]: codes two to a byte (low nibble is the even index) and one E8M0 byte per 32 of them. A product
// over one block is formed from the bare codes {0, .5, 1, 1.5, 2, 3, 4, 6} and then scaled, all in float32:
//     y[m, n] = sum_b 2^(s[n, b] - 127) * sum_{i < 32} x[m, 32 b + i] * code[n, 32 b + i]
// A result does not depend on the number of threads nor on m: each y[m, n] is summed in one fixed order.
//
// This header is included by files compiled for different instruction sets: declarations and plain data only.
#pragma once

#include <cstdint>

namespace fourfold {

constexpr std::int64_t kBlock = 32;

enum class Float { f32, bf16 };

struct LinearProblem {
    const void* x;               // [m, k] as `prepare` laid it out
    const std::uint8_t* blocks;  // [n, k / 2]
    const std::uint8_t* scales;  // [n, k / 32]
    void* out;                   // [m, n] of `type`
    Float type;
    std::int64_t m, n, k;
};

struct LinearKernel {
    // bytes of x once laid out, and the laying out; x is [m, k] contiguous, the destination 64-byte aligned
    std::int64_t (*prepared_bytes)(std::int64_t m, std::int64_t k);
    void (*prepare)(const void* x, Float type, std::int64_t m, std::int64_t k, void* prepared);
    // rows [begin, end) of W, all m rows of x
    void (*rows)(const LinearProblem& problem, std::int64_t begin, std::int64_t end);
};

struct ExpandProblem {
    const std::uint8_t* blocks;
    const std::uint8_t* scales;
    void* out;  // [n, k] of `type`
    Float type;
    std::int64_t n, k;
};

using ExpandRows = void (*)(const ExpandProblem& problem, std::int64_t begin, std::int64_t end);

// 2^(byte - 127); byte 0 is the float32 subnormal 2^-127 and byte 255 is NaN.
extern const float* const kScaleValues;

extern const LinearKernel kLinearPortable;
void expand_rows_portable(const ExpandProblem& problem, std::int64_t begin, std::int64_t end);
#if defined(FOURFOLD_AVX512)
extern const LinearKernel kLinearAvx512;  // x of either type, computed as float32
void expand_rows_avx512(const ExpandProblem& problem, std::int64_t begin, std::int64_t end);
#endif
#if defined(FOURFOLD_AVX512BF16)
extern const LinearKernel kLinearAvx512Bf16;  // x bf16 only
#endif

enum class Isa { automatic, portable, avx512, avx512bf16 };

bool cpu_has(Isa isa);  // the processor has it and this build holds it
void mxfp4_linear(const void* x, const LinearProblem& problem, Isa isa);
void mxfp4_expand(const ExpandProblem& problem, Isa isa);

}  // namespace fourfold
