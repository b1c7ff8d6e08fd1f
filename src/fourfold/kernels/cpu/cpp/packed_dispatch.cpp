// Which instructions run: the best that the processor and this build have, or those that a test names.
#include <initializer_list>

#include "packed_layout.h"
#include "processor.h"

namespace fourfold {
namespace {

PackedIsa best_isa() {
    for (PackedIsa isa : {PackedIsa::avx512bf16, PackedIsa::avx512vnni, PackedIsa::avx2})
        if (packed_isa_usable(isa)) return isa;
    return PackedIsa::portable;
}

PackedIsa resolve(PackedIsa isa) {
    static const PackedIsa best = best_isa();
    return isa == PackedIsa::automatic ? best : isa;
}

PackedTiles tiles_of(Arithmetic arithmetic, PackedIsa isa) {
#if defined(FOURFOLD_AVX512VNNI)
    if (arithmetic == Arithmetic::int8 && isa >= PackedIsa::avx512vnni) return packed_int8_avx512;
#endif
#if defined(FOURFOLD_AVX512BF16)
    if (arithmetic == Arithmetic::exact && isa >= PackedIsa::avx512bf16) return packed_exact_avx512;
#endif
#if defined(FOURFOLD_AVX2)
    if (isa >= PackedIsa::avx2) return arithmetic == Arithmetic::int8 ? packed_int8_avx2 : packed_exact_avx2;
#endif
    (void)isa;
    return arithmetic == Arithmetic::int8 ? packed_int8_portable : packed_exact_portable;
}

PrepareRow prepare_of(Arithmetic arithmetic, PackedIsa isa) {
#if defined(FOURFOLD_AVX512VNNI)
    if (arithmetic == Arithmetic::int8 && isa >= PackedIsa::avx512vnni) return prepare_int8_avx512;
#endif
#if defined(FOURFOLD_AVX512BF16)
    if (arithmetic == Arithmetic::exact && isa >= PackedIsa::avx512bf16) return prepare_exact_avx512;
#endif
#if defined(FOURFOLD_AVX2)
    if (isa >= PackedIsa::avx2)
        return arithmetic == Arithmetic::int8 ? prepare_int8_avx2_floats : prepare_exact_avx2_floats;
#endif
    (void)isa;
    return arithmetic == Arithmetic::int8 ? prepare_int8_portable : prepare_exact_portable;
}

}  // namespace

bool packed_isa_usable(PackedIsa isa) {
    switch (isa) {
#if defined(FOURFOLD_AVX2)
        case PackedIsa::avx2:
            return processor_has_avx2();
#endif
#if defined(FOURFOLD_AVX512VNNI)
        case PackedIsa::avx512vnni:
            return processor_has_avx512() && __builtin_cpu_supports("avx512vnni");
#endif
#if defined(FOURFOLD_AVX512VNNI) && defined(FOURFOLD_AVX512BF16)
        case PackedIsa::avx512bf16:
            return packed_isa_usable(PackedIsa::avx512vnni) && __builtin_cpu_supports("avx512bf16");
#endif
        default:
            return isa == PackedIsa::automatic || isa == PackedIsa::portable;
    }
}

std::int64_t prepared_bytes(Arithmetic arithmetic, std::int64_t m, std::int64_t k) {
    return m * prepared_row_bytes(arithmetic, k);
}

std::int64_t prepared_offset(Arithmetic arithmetic, std::int64_t i) {
    const std::size_t block = arithmetic == Arithmetic::int8 ? sizeof(Int8Block) : sizeof(Bf16Block);
    return i / kPackedBlock * static_cast<std::int64_t>(block);
}

void prepare(Arithmetic arithmetic, const float* x, std::int64_t stride, std::int64_t, std::int64_t k,
             std::int64_t row_begin, std::int64_t row_end, void* prepared, PackedIsa isa) {
    const PrepareRow one = prepare_of(arithmetic, resolve(isa));
    const std::int64_t bytes = prepared_row_bytes(arithmetic, k);
    for (std::int64_t i = row_begin; i < row_end; ++i) one(x + i * stride, k, static_cast<char*>(prepared) + i * bytes);
}

void linear(const PackedWeight& weight, Arithmetic arithmetic, const void* prepared, std::int64_t m, float* out,
            std::int64_t out_stride, std::int64_t tile_begin, std::int64_t tile_end, PackedIsa isa) {
    const Arithmetic used = weight.kind == WeightKind::bf16 ? Arithmetic::exact : arithmetic;
    tiles_of(used, resolve(isa))({weight, prepared, m, out, out_stride}, tile_begin, tile_end);
}

}  // namespace fourfold
