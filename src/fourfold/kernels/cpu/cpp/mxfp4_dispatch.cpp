// Which kernel runs, and how its rows are cut into chunks for the threads.
#include <algorithm>
#include <cstring>
#include <memory>

#include "mxfp4.h"
#include "thread_pool.h"

namespace fourfold {
namespace {

// Multiply-adds per chunk: at most some microseconds, so that the tail is short, and at least one, since handing
// a chunk to another thread costs about that.
constexpr std::int64_t kMostWork = 1 << 17;
constexpr std::int64_t kLeastWork = 1 << 15;
// Rows are dealt out in even numbers, since kernels take two at a time.
constexpr std::int64_t kRowsTogether = 2;

struct ScaleValues {
    alignas(64) float value[256];
    ScaleValues() {
        for (std::uint32_t byte = 0; byte < 256; ++byte) {
            std::uint32_t bits = byte << 23;
            if (byte == 0) bits = 0x00400000u;
            if (byte == 255) bits = 0x7FC00000u;
            std::memcpy(&value[byte], &bits, 4);
        }
    }
};
const ScaleValues g_scale_values;

// Grows and never shrinks: one buffer per calling thread for x as a kernel wants it.
struct Scratch {
    std::unique_ptr<unsigned char[]> memory;
    std::int64_t size = 0;
    void* at_least(std::int64_t bytes) {
        if (bytes > size) {
            memory.reset(new unsigned char[static_cast<std::size_t>(bytes) + 64]);
            size = bytes;
        }
        auto address = reinterpret_cast<std::uintptr_t>(memory.get());
        return reinterpret_cast<void*>((address + 63) & ~static_cast<std::uintptr_t>(63));
    }
};
thread_local Scratch t_scratch;

const LinearKernel& linear_kernel(Isa isa, Float type) {
#if defined(FOURFOLD_AVX512BF16)
    if (isa == Isa::avx512bf16 && type == Float::bf16) return kLinearAvx512Bf16;
#endif
#if defined(FOURFOLD_AVX512)
    if (isa == Isa::avx512 || isa == Isa::avx512bf16) return kLinearAvx512;
#endif
    (void)isa;
    (void)type;
    return kLinearPortable;
}

Isa best_isa() {
    if (cpu_has(Isa::avx512bf16)) return Isa::avx512bf16;
    return cpu_has(Isa::avx512) ? Isa::avx512 : Isa::portable;
}

Isa resolve(Isa isa) {
    static const Isa best = best_isa();
    return isa == Isa::automatic ? best : isa;
}

std::int64_t rows_per_chunk(std::int64_t rows, std::int64_t work_per_row) {
    work_per_row = std::max<std::int64_t>(1, work_per_row);
    std::int64_t fair = (rows + threads() - 1) / threads();
    std::int64_t grain = std::clamp(fair, kLeastWork / work_per_row, std::max<std::int64_t>(1, kMostWork / work_per_row));
    return (grain + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
}

struct LinearTask {
    const LinearProblem& problem;
    const LinearKernel& kernel;
};

struct ExpandTask {
    const ExpandProblem& problem;
    ExpandRows rows;
};

}  // namespace

const float* const kScaleValues = g_scale_values.value;

bool cpu_has(Isa isa) {
    switch (isa) {
#if defined(FOURFOLD_AVX512)
        case Isa::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("fma");
#endif
#if defined(FOURFOLD_AVX512BF16)
        case Isa::avx512bf16:
            return cpu_has(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
        case Isa::automatic:
        case Isa::portable:
            return true;
        default:
            return false;
    }
}

void mxfp4_linear(const void* x, const LinearProblem& problem, Isa isa) {
    const LinearKernel& kernel = linear_kernel(resolve(isa), problem.type);
    void* prepared = t_scratch.at_least(kernel.prepared_bytes(problem.m, problem.k));
    kernel.prepare(x, problem.type, problem.m, problem.k, prepared);
    LinearProblem ready = problem;
    ready.x = prepared;
    LinearTask task{ready, kernel};
    auto body = [](const void* context, std::int64_t begin, std::int64_t end) {
        auto& it = *static_cast<const LinearTask*>(context);
        it.kernel.rows(it.problem, begin, end);
    };
    parallel_for(problem.n, rows_per_chunk(problem.n, problem.m * problem.k), body, &task);
}

void mxfp4_expand(const ExpandProblem& problem, Isa isa) {
    ExpandTask task{problem, expand_rows_portable};
#if defined(FOURFOLD_AVX512)
    if (resolve(isa) != Isa::portable) task.rows = expand_rows_avx512;
#endif
    (void)isa;
    auto body = [](const void* context, std::int64_t begin, std::int64_t end) {
        auto& it = *static_cast<const ExpandTask*>(context);
        it.rows(it.problem, begin, end);
    };
    parallel_for(problem.n, rows_per_chunk(problem.n, problem.k), body, &task);
}

}  // namespace fourfold
