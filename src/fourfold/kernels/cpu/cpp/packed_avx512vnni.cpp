// Which form of the integer products takes a call.
#include "packed_avx512vnni_few.h"
#include "packed_avx512vnni_many.h"
#include "packed_avx512vnni_prepare.h"

namespace fourfold {
namespace {

constexpr std::int64_t kFewRows = 32;  // for which decoding them twice is no slower than going through a cache

template <typename Weight>
void rows_of(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    if (call.m <= kFewRows) all_rows<Dot<Weight>>(call, tile_begin, tile_end);
    else many_rows<Weight>(call, tile_begin, tile_end);
}

}  // namespace

void packed_int8_avx512(const PackedLinear& call, std::int64_t tile_begin, std::int64_t tile_end) {
    if (call.weight.kind == WeightKind::int8) rows_of<Int8>(call, tile_begin, tile_end);
    else rows_of<Mxfp4>(call, tile_begin, tile_end);
}

void prepare_int8_avx512(const float* x, std::int64_t k, void* row) {
    auto* to = static_cast<Int8Block*>(row);
    std::int64_t b = 0;
    for (; b + 16 <= k / kPackedBlock; b += 16) prepare_blocks(x + b * kPackedBlock, to + b);
    for (; b < k / kPackedBlock; ++b) prepare_block(x + b * kPackedBlock, to[b]);
}

}  // namespace fourfold
